#include "mlot/cuda/row_divergence.h"

#include <cmath>

#include "common.h"
#include "mlot/torch/row_divergence.h"

namespace mlot::cuda {
namespace {

DivergenceProblem problem_of(const Tensor& student_values, const LogitsRows& student, const Tensor& teacher_values,
                             const LogitsRows& teacher, const DivergenceOptions& options) {
  check_pair(student, teacher);
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;  // pairs are numbered in 32 bits, and looked for by their columns
  STD_TORCH_CHECK(
      options.pair_count <= kMost && (!options.pairs || (student.vocab_size < kMost && teacher.vocab_size < kMost)),
      "at most 2^31 - 1 pairs and columns");
  return {.sides = {student, teacher},
          .dtypes = {Dtype(dtype_index(student_values)), Dtype(dtype_index(teacher_values))},
          .options = options,
          .constants = constants_of(options, 1),
          .log_floor = std::log(options.floor)};
}

RowDivergenceOutputs row_divergence_forward(const Tensor& student_values, const Tensor& student_index,
                                            const std::optional<Tensor>& student_column_mask,
                                            const std::optional<Tensor>& student_log_scale, double student_temperature,
                                            bool student_standardize, int64_t student_vocab_size,
                                            const Tensor& teacher_values, const Tensor& teacher_index,
                                            const std::optional<Tensor>& teacher_column_mask,
                                            const std::optional<Tensor>& teacher_log_scale, double teacher_temperature,
                                            bool teacher_standardize, int64_t teacher_vocab_size,
                                            const std::optional<Tensor>& column_pairs, const std::string& kind,
                                            double beta, double skew, double head, double interpolation, double floor) {
  const OnDevice on(student_values);
  const LogitsArguments student(student_values, student_index, student_column_mask, student_log_scale,
                                student_temperature, student_standardize, student_vocab_size);
  const LogitsArguments teacher(teacher_values, teacher_index, teacher_column_mask, teacher_log_scale,
                                teacher_temperature, teacher_standardize, teacher_vocab_size);
  const DivergenceArguments options(column_pairs, kind, beta, skew, head, interpolation, floor, student_vocab_size,
                                    teacher_vocab_size);
  const RowDivergenceMade made(student_values, teacher_values, student_index);
  const RowDivergenceForward call{
      .problem = problem_of(student_values, student.rows, teacher_values, teacher.rows, options.value),
      .loss = made.loss.mutable_data_ptr(),
      .saved = {pointers_of<DivergenceSaved, void*>(made.student), pointers_of<DivergenceSaved, void*>(made.teacher)},
      .share = made.share.mutable_data_ptr(),
      .target_log_total = made.target_log_total.mutable_data_ptr()};
  launch_row_divergence_forward(call, on.stream);
  return made.outputs();
}

GradientsOfSides row_divergence_backward(
    const Tensor& grad, const Tensor& student_values, const Tensor& student_index,
    const std::optional<Tensor>& student_column_mask, const std::optional<Tensor>& student_log_scale,
    double student_temperature, bool student_standardize, int64_t student_vocab_size, const Tensor& teacher_values,
    const Tensor& teacher_index, const std::optional<Tensor>& teacher_column_mask,
    const std::optional<Tensor>& teacher_log_scale, double teacher_temperature, bool teacher_standardize,
    int64_t teacher_vocab_size, const std::optional<Tensor>& column_pairs, const std::string& kind, double beta,
    double skew, double head, double interpolation, double floor, const Tensor& student_peak,
    const Tensor& student_log_total, const Tensor& student_mean, const Tensor& student_scale,
    const Tensor& student_slope, const Tensor& student_total, const Tensor& student_moment, const Tensor& teacher_peak,
    const Tensor& teacher_log_total, const Tensor& teacher_mean, const Tensor& teacher_scale,
    const Tensor& teacher_slope, const Tensor& teacher_total, const Tensor& teacher_moment, const Tensor& share,
    const Tensor& target_log_total, bool student_needed, bool teacher_needed) {
  const OnDevice on(student_values);
  const LogitsArguments student(student_values, student_index, student_column_mask, student_log_scale,
                                student_temperature, student_standardize, student_vocab_size);
  const LogitsArguments teacher(teacher_values, teacher_index, teacher_column_mask, teacher_log_scale,
                                teacher_temperature, teacher_standardize, teacher_vocab_size);
  const DivergenceArguments options(column_pairs, kind, beta, skew, head, interpolation, floor, student_vocab_size,
                                    teacher_vocab_size);
  const Tensor &s = student_values, &t = teacher_values;
  const GivenSide<7> of_student(
      s, student_index, student_needed, grad,
      {student_peak, student_log_total, student_mean, student_scale, student_slope, student_total, student_moment}),
      of_teacher(
          t, teacher_index, teacher_needed, grad,
          {teacher_peak, teacher_log_total, teacher_mean, teacher_scale, teacher_slope, teacher_total, teacher_moment});
  const RowDivergenceGiven of_both(share, target_log_total, s, t, student_index);
  const DivergenceProblem problem = problem_of(s, student.rows, t, teacher.rows, options.value);
  const auto gradient_of = [&](int own, const Tensor& values, const GivenSide<7>& given, bool needed) {
    if (!needed) return torch::stable::new_empty(values, {0});
    const Tensor grad_values = torch::stable::new_empty(values, values.sizes());
    const Tensor slot_of = torch::stable::new_empty(values, {values.size(0), values.size(1)}, ScalarType::Int);
    const int64_t words =
        problem.options.pairs ? words_of_pairs(problem.options.pair_count, problem.sides[own].vocab_size) : 0;
    const Tensor pair_lists = torch::stable::new_empty(values, {words}, ScalarType::Int);
    const RowDivergenceBackward call{.problem = problem,
                                     .saved = {pointers_of<DivergenceSaved, const void*>(of_student.saved),
                                               pointers_of<DivergenceSaved, const void*>(of_teacher.saved)},
                                     .share = of_both.share.const_data_ptr(),
                                     .target_log_total = of_both.target_log_total.const_data_ptr(),
                                     .own = own,
                                     .grad = given.grad.const_data_ptr(),
                                     .grad_values = grad_values.mutable_data_ptr(),
                                     .grad_log_scale = given.grad_log_scale.mutable_data_ptr(),
                                     .slot_of = static_cast<int32_t*>(slot_of.mutable_data_ptr()),
                                     .pair_lists = static_cast<uint32_t*>(pair_lists.mutable_data_ptr())};
    launch_row_divergence_backward(call, on.stream);
    return grad_values;
  };
  const Tensor student_gradient = gradient_of(0, s, of_student, student_needed);
  const Tensor teacher_gradient = gradient_of(1, t, of_teacher, teacher_needed);
  return {student_gradient, of_student.grad_log_scale, teacher_gradient, of_teacher.grad_log_scale};
}

}  // namespace
}  // namespace mlot::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cuda, library) {
  library.def(mlot::kRowDivergenceForward);
  library.def(mlot::kRowDivergenceBackward);
}

MLOT_CUDA_IMPLEMENTATIONS(library) {
  library.impl("row_divergence_forward", TORCH_BOX(&mlot::cuda::row_divergence_forward));
  library.impl("row_divergence_backward", TORCH_BOX(&mlot::cuda::row_divergence_backward));
}
