#include "mlot/cpu/sorted_l1.h"

#include <string>

#include "common.h"
#include "mlot/torch/sorted_l1.h"

namespace mlot {
namespace {

SortedL1Outputs sorted_l1_forward(const Tensor& student_values, const Tensor& student_index,
                                  const std::optional<Tensor>& student_column_mask,
                                  const std::optional<Tensor>& student_log_scale, double student_temperature,
                                  bool student_standardize, int64_t student_vocab_size, const Tensor& teacher_values,
                                  const Tensor& teacher_index, const std::optional<Tensor>& teacher_column_mask,
                                  const std::optional<Tensor>& teacher_log_scale, double teacher_temperature,
                                  bool teacher_standardize, int64_t teacher_vocab_size, const std::string& ties,
                                  int64_t top_k, const std::string& tail) {
  const LogitsArguments student(student_values, student_index, student_column_mask, student_log_scale,
                                {student_temperature}, student_standardize, student_vocab_size);
  const LogitsArguments teacher(teacher_values, teacher_index, teacher_column_mask, teacher_log_scale,
                                {teacher_temperature}, teacher_standardize, teacher_vocab_size);
  check_sorted_l1_pair(student.rows, teacher.rows);
  const SortedL1Made made(student_values, teacher_values, student_index);
  const SortedL1Forward call{
      {student.rows, teacher.rows},
      sorted_l1_options(ties, top_k, tail),
      made.loss.mutable_data_ptr(),
      {pointers_of<SortedL1Saved, void*>(made.student), pointers_of<SortedL1Saved, void*>(made.teacher)}};
  MLOT_SELECT(sorted_l1).forward[dtype_index(student_values)][dtype_index(teacher_values)](call, threads());
  return made.outputs();
}

GradientsOfSides sorted_l1_backward(
    const Tensor& grad, const Tensor& student_values, const Tensor& student_index,
    const std::optional<Tensor>& student_column_mask, const std::optional<Tensor>& student_log_scale,
    double student_temperature, bool student_standardize, int64_t student_vocab_size, const Tensor& teacher_values,
    const Tensor& teacher_index, const std::optional<Tensor>& teacher_column_mask,
    const std::optional<Tensor>& teacher_log_scale, double teacher_temperature, bool teacher_standardize,
    int64_t teacher_vocab_size, const std::string& ties, int64_t top_k, const std::string& tail,
    const Tensor& student_peak, const Tensor& student_log_total, const Tensor& student_mean,
    const Tensor& student_scale, const Tensor& student_slope, const Tensor& student_total, const Tensor& student_moment,
    const Tensor& student_steps, const Tensor& teacher_peak, const Tensor& teacher_log_total,
    const Tensor& teacher_mean, const Tensor& teacher_scale, const Tensor& teacher_slope, const Tensor& teacher_total,
    const Tensor& teacher_moment, const Tensor& teacher_steps, bool student_needed, bool teacher_needed) {
  const LogitsArguments student(student_values, student_index, student_column_mask, student_log_scale,
                                {student_temperature}, student_standardize, student_vocab_size);
  const LogitsArguments teacher(teacher_values, teacher_index, teacher_column_mask, teacher_log_scale,
                                {teacher_temperature}, teacher_standardize, teacher_vocab_size);
  check_sorted_l1_pair(student.rows, teacher.rows);
  const Tensor &s = student_values, &t = teacher_values;
  const SortedL1GivenSide of_student(s, student_index, student_needed, grad,
                                     {student_peak, student_log_total, student_mean, student_scale, student_slope,
                                      student_total, student_moment, student_steps}),
      of_teacher(t, teacher_index, teacher_needed, grad,
                 {teacher_peak, teacher_log_total, teacher_mean, teacher_scale, teacher_slope, teacher_total,
                  teacher_moment, teacher_steps});
  const SideGradient student_gradient(s, student_needed), teacher_gradient(t, teacher_needed);
  const SortedL1Backward call{
      {student.rows, teacher.rows},
      sorted_l1_options(ties, top_k, tail),
      {of_student.grad.const_data_ptr(), of_teacher.grad.const_data_ptr()},
      {pointers_of<SortedL1Saved, const void*>(of_student.saved),
       pointers_of<SortedL1Saved, const void*>(of_teacher.saved)},
      {student_gradient.written, teacher_gradient.written},
      {of_student.grad_log_scale.mutable_data_ptr(), of_teacher.grad_log_scale.mutable_data_ptr()}};
  MLOT_SELECT(sorted_l1).backward[dtype_index(s)][dtype_index(t)](call, threads());
  return {student_gradient.tensor, of_student.grad_log_scale, teacher_gradient.tensor, of_teacher.grad_log_scale};
}

}  // namespace
}  // namespace mlot

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def(mlot::kSortedL1Forward);
  library.def(mlot::kSortedL1Backward);
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("sorted_l1_forward", TORCH_BOX(&mlot::sorted_l1_forward));
  library.impl("sorted_l1_backward", TORCH_BOX(&mlot::sorted_l1_backward));
}
