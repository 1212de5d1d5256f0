#include "mlot/cpu/row_divergence.h"

#include "common.h"
#include "mlot/torch/row_divergence.h"

namespace mlot {
namespace {

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
  const LogitsArguments student(student_values, student_index, student_column_mask, student_log_scale,
                                {student_temperature}, student_standardize, student_vocab_size);
  const LogitsArguments teacher(teacher_values, teacher_index, teacher_column_mask, teacher_log_scale,
                                {teacher_temperature}, teacher_standardize, teacher_vocab_size);
  check_pair(student.rows, teacher.rows);
  const DivergenceArguments options(column_pairs, kind, beta, skew, head, interpolation, floor, student_vocab_size,
                                    teacher_vocab_size);
  const RowDivergenceMade made(student_values, teacher_values, student_index);
  const RowDivergenceForward call{
      .sides = {student.rows, teacher.rows},
      .options = options.value,
      .loss = made.loss.mutable_data_ptr(),
      .saved = {pointers_of<DivergenceSaved, void*>(made.student), pointers_of<DivergenceSaved, void*>(made.teacher)},
      .share = made.share.mutable_data_ptr(),
      .target_log_total = made.target_log_total.mutable_data_ptr()};
  MLOT_SELECT(row_divergence).forward[dtype_index(student_values)][dtype_index(teacher_values)](call, threads());
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
  const LogitsArguments student(student_values, student_index, student_column_mask, student_log_scale,
                                {student_temperature}, student_standardize, student_vocab_size);
  const LogitsArguments teacher(teacher_values, teacher_index, teacher_column_mask, teacher_log_scale,
                                {teacher_temperature}, teacher_standardize, teacher_vocab_size);
  check_pair(student.rows, teacher.rows);
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
  const SideGradient student_gradient(s, student_needed), teacher_gradient(t, teacher_needed);
  const RowDivergenceBackward call{
      .sides = {student.rows, teacher.rows},
      .options = options.value,
      .grad = {of_student.grad.const_data_ptr(), of_teacher.grad.const_data_ptr()},
      .saved = {pointers_of<DivergenceSaved, const void*>(of_student.saved),
                pointers_of<DivergenceSaved, const void*>(of_teacher.saved)},
      .share = of_both.share.const_data_ptr(),
      .target_log_total = of_both.target_log_total.const_data_ptr(),
      .grad_values = {student_gradient.written, teacher_gradient.written},
      .grad_log_scale = {of_student.grad_log_scale.mutable_data_ptr(), of_teacher.grad_log_scale.mutable_data_ptr()}};
  MLOT_SELECT(row_divergence).backward[dtype_index(s)][dtype_index(t)](call, threads());
  return {student_gradient.tensor, of_student.grad_log_scale, teacher_gradient.tensor, of_teacher.grad_log_scale};
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
