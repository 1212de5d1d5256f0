#include "mlot/cpu/row_divergence.h"

#include "common.h"
#include "mlot/torch/row_divergence.h"

namespace mlot {
namespace {

void check_pair(const LogitsArguments& student, const LogitsArguments& teacher) {
  const LogitsRows &s = student.rows, &t = teacher.rows;
  STD_TORCH_CHECK(s.sequences == t.sequences && s.slots == t.slots, "both sides must have the same rows [B, A]");
}

DivergenceSaved<void*> mutable_pointers(const DivergenceScalars& scalars) {
  const auto at = [&](int i) { return scalars[i].mutable_data_ptr(); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
}

DivergenceSaved<const void*> pointers(const DivergenceScalars& scalars) {
  const auto at = [&](int i) { return scalars[i].const_data_ptr(); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6)};
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
                                            double beta, double skew, double head, double interpolation) {
  const LogitsArguments student(student_values, student_index, student_column_mask, student_log_scale,
                                {student_temperature}, student_standardize, student_vocab_size);
  const LogitsArguments teacher(teacher_values, teacher_index, teacher_column_mask, teacher_log_scale,
                                {teacher_temperature}, teacher_standardize, teacher_vocab_size);
  check_pair(student, teacher);
  const DivergenceArguments options(column_pairs, kind, beta, skew, head, interpolation, student_vocab_size,
                                    teacher_vocab_size);
  const auto fresh = [&](ScalarType dtype) {
    return torch::stable::new_empty(student_values, student_index.sizes(), dtype);
  };
  const auto scalars = [&](const Tensor& values) {
    const auto one = [&] { return fresh(accumulator(values)); };
    return DivergenceScalars{one(), one(), one(), one(), one(), one(), one()};
  };
  const ScalarType wider = accumulator(student_values, teacher_values);
  const Tensor loss = fresh(wider), share = fresh(wider), target_log_total = fresh(wider);
  const DivergenceScalars of_student = scalars(student_values), of_teacher = scalars(teacher_values);
  const RowDivergenceForward call{.sides = {student.rows, teacher.rows},
                                  .options = options.value,
                                  .loss = loss.mutable_data_ptr(),
                                  .saved = {mutable_pointers(of_student), mutable_pointers(of_teacher)},
                                  .share = share.mutable_data_ptr(),
                                  .target_log_total = target_log_total.mutable_data_ptr()};
  MLOT_SELECT(row_divergence).forward[dtype_index(student_values)][dtype_index(teacher_values)](call, threads());
  return std::tuple_cat(std::tuple(loss), std::tuple_cat(of_student), std::tuple_cat(of_teacher),
                        std::tuple(share, target_log_total));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_divergence_backward(
    const Tensor& grad, const Tensor& student_values, const Tensor& student_index,
    const std::optional<Tensor>& student_column_mask, const std::optional<Tensor>& student_log_scale,
    double student_temperature, bool student_standardize, int64_t student_vocab_size, const Tensor& teacher_values,
    const Tensor& teacher_index, const std::optional<Tensor>& teacher_column_mask,
    const std::optional<Tensor>& teacher_log_scale, double teacher_temperature, bool teacher_standardize,
    int64_t teacher_vocab_size, const std::optional<Tensor>& column_pairs, const std::string& kind, double beta,
    double skew, double head, double interpolation, const Tensor& student_peak, const Tensor& student_log_total,
    const Tensor& student_mean, const Tensor& student_scale, const Tensor& student_slope, const Tensor& student_total,
    const Tensor& student_moment, const Tensor& teacher_peak, const Tensor& teacher_log_total,
    const Tensor& teacher_mean, const Tensor& teacher_scale, const Tensor& teacher_slope, const Tensor& teacher_total,
    const Tensor& teacher_moment, const Tensor& share, const Tensor& target_log_total, bool student_needed,
    bool teacher_needed) {
  const LogitsArguments student(student_values, student_index, student_column_mask, student_log_scale,
                                {student_temperature}, student_standardize, student_vocab_size);
  const LogitsArguments teacher(teacher_values, teacher_index, teacher_column_mask, teacher_log_scale,
                                {teacher_temperature}, teacher_standardize, teacher_vocab_size);
  check_pair(student, teacher);
  const DivergenceArguments options(column_pairs, kind, beta, skew, head, interpolation, student_vocab_size,
                                    teacher_vocab_size);
  const int64_t slots = student.rows.all_slots();
  const auto rows = [slots](const Tensor& tensor, ScalarType dtype) {
    STD_TORCH_CHECK(tensor.numel() == slots, "grad and what forward saved must be [B, A]");
    return dense(tensor, dtype);
  };
  const ScalarType s = accumulator(student_values), t = accumulator(teacher_values),
                   wider = accumulator(student_values, teacher_values);
  const DivergenceScalars of_student{rows(student_peak, s),  rows(student_log_total, s), rows(student_mean, s),
                                     rows(student_scale, s), rows(student_slope, s),     rows(student_total, s),
                                     rows(student_moment, s)},
      of_teacher{rows(teacher_peak, t),  rows(teacher_log_total, t), rows(teacher_mean, t),  rows(teacher_scale, t),
                 rows(teacher_slope, t), rows(teacher_total, t),     rows(teacher_moment, t)};
  const Tensor grad_of_student = rows(grad, s), grad_of_teacher = rows(grad, t), of_share = rows(share, wider),
               of_target = rows(target_log_total, wider);
  // A side that is not needed gets empty gradients.
  const auto rows_like = [](const Tensor& values, const Tensor& index, bool needed) {
    return needed ? torch::stable::new_empty(values, index.sizes(), accumulator(values))
                  : torch::stable::new_empty(values, {0}, accumulator(values));
  };
  const SideGradient student_gradient(student_values, student_needed), teacher_gradient(teacher_values, teacher_needed);
  const Tensor student_scale_gradient = rows_like(student_values, student_index, student_needed),
               teacher_scale_gradient = rows_like(teacher_values, teacher_index, teacher_needed);
  const RowDivergenceBackward call{
      .sides = {student.rows, teacher.rows},
      .options = options.value,
      .grad = {grad_of_student.const_data_ptr(), grad_of_teacher.const_data_ptr()},
      .saved = {pointers(of_student), pointers(of_teacher)},
      .share = of_share.const_data_ptr(),
      .target_log_total = of_target.const_data_ptr(),
      .grad_values = {student_gradient.written, teacher_gradient.written},
      .grad_log_scale = {student_scale_gradient.mutable_data_ptr(), teacher_scale_gradient.mutable_data_ptr()}};
  MLOT_SELECT(row_divergence).backward[dtype_index(student_values)][dtype_index(teacher_values)](call, threads());
  return {student_gradient.tensor, student_scale_gradient, teacher_gradient.tensor, teacher_scale_gradient};
}

}  // namespace
}  // namespace mlot

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def(mlot::kRowDivergenceForward);
  library.def(mlot::kRowDivergenceBackward);
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("row_divergence_forward", TORCH_BOX(&mlot::row_divergence_forward));
  library.impl("row_divergence_backward", TORCH_BOX(&mlot::row_divergence_backward));
}
