#include "mlot/cpu/sorted_l1.h"

#include <array>
#include <string>
#include <tuple>
#include <type_traits>

#include "common.h"

namespace mlot {
namespace {

constexpr int64_t kMostColumns = (int64_t(1) << 31) - 1;  // the kernels count columns in 32 bits

using SavedOfSide = std::array<Tensor, 8>;  // as SortedL1Saved has them

template <class Pointer>
SortedL1Saved<Pointer> pointers(const SavedOfSide& saved) {
  const auto at = [&](int i) {
    if constexpr (std::is_const_v<std::remove_pointer_t<Pointer>>) {
      return saved[i].const_data_ptr();
    } else {
      return saved[i].mutable_data_ptr();
    }
  };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
}

SortedL1Options options_of(const std::string& ties, int64_t top_k, const std::string& tail) {
  STD_TORCH_CHECK(ties == "mean" || ties == "stable", "ties must be mean or stable");
  STD_TORCH_CHECK(tail == "bucket" || tail == "drop", "tail must be bucket or drop");
  STD_TORCH_CHECK(top_k >= 1, "top_k must be at least 1");
  return {ties == "mean", top_k, tail == "bucket"};
}

void check_pair(const LogitsArguments& student, const LogitsArguments& teacher) {
  const LogitsRows &s = student.rows, &t = teacher.rows;
  STD_TORCH_CHECK(s.sequences == t.sequences && s.slots == t.slots, "both sides must have the same rows [B, A]");
  STD_TORCH_CHECK(s.vocab_size <= kMostColumns && t.vocab_size <= kMostColumns, "at most 2^31 - 1 columns");
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                           Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs sorted_l1_forward(const Tensor& student_values, const Tensor& student_index,
                          const std::optional<Tensor>& student_column_mask,
                          const std::optional<Tensor>& student_log_scale, double student_temperature,
                          bool student_standardize, int64_t student_vocab_size, const Tensor& teacher_values,
                          const Tensor& teacher_index, const std::optional<Tensor>& teacher_column_mask,
                          const std::optional<Tensor>& teacher_log_scale, double teacher_temperature,
                          bool teacher_standardize, int64_t teacher_vocab_size, const std::string& ties, int64_t top_k,
                          const std::string& tail) {
  const LogitsArguments student(student_values, student_index, student_column_mask, student_log_scale,
                                {student_temperature}, student_standardize, student_vocab_size);
  const LogitsArguments teacher(teacher_values, teacher_index, teacher_column_mask, teacher_log_scale,
                                {teacher_temperature}, teacher_standardize, teacher_vocab_size);
  check_pair(student, teacher);
  const int64_t B = student.rows.sequences, A = student.rows.slots;
  const auto fresh = [&](const Tensor& values) {
    const auto row = [&] { return torch::stable::new_empty(values, {B, A}, accumulator(values)); };
    return SavedOfSide{
        row(), row(), row(), row(),
        row(), row(), row(), torch::stable::new_empty(values, {B, A, kSavedSteps, 2}, accumulator(values))};
  };
  const Tensor loss = torch::stable::new_empty(student_values, {B, A}, accumulator(student_values, teacher_values));
  const SavedOfSide of_student = fresh(student_values), of_teacher = fresh(teacher_values);
  const SortedL1Forward call{{student.rows, teacher.rows},
                             options_of(ties, top_k, tail),
                             loss.mutable_data_ptr(),
                             {pointers<void*>(of_student), pointers<void*>(of_teacher)}};
  MLOT_SELECT(sorted_l1).forward[dtype_index(student_values)][dtype_index(teacher_values)](call, threads());
  return std::tuple_cat(std::tuple(loss), std::tuple_cat(of_student), std::tuple_cat(of_teacher));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sorted_l1_backward(
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
  check_pair(student, teacher);
  const int64_t slots = student.rows.all_slots();
  const auto rows = [slots](const Tensor& tensor, const Tensor& values, int64_t each = 1) {
    STD_TORCH_CHECK(tensor.numel() == slots * each, "grad and what forward saved must be [B, A], steps [B, A, 64, 2]");
    return dense(tensor, accumulator(values));
  };
  const Tensor &s = student_values, &t = teacher_values;
  const SavedOfSide of_student{rows(student_peak, s),   rows(student_log_total, s),
                               rows(student_mean, s),   rows(student_scale, s),
                               rows(student_slope, s),  rows(student_total, s),
                               rows(student_moment, s), rows(student_steps, s, 2 * kSavedSteps)},
      of_teacher{rows(teacher_peak, t),   rows(teacher_log_total, t),
                 rows(teacher_mean, t),   rows(teacher_scale, t),
                 rows(teacher_slope, t),  rows(teacher_total, t),
                 rows(teacher_moment, t), rows(teacher_steps, t, 2 * kSavedSteps)};
  const Tensor grad_of_student = rows(grad, s), grad_of_teacher = rows(grad, t);
  // A side that is not needed gets empty gradients.
  const auto rows_like = [](const Tensor& values, const Tensor& index, bool needed) {
    return needed ? torch::stable::new_empty(values, index.sizes(), accumulator(values))
                  : torch::stable::new_empty(values, {0}, accumulator(values));
  };
  const SideGradient student_gradient(s, student_needed), teacher_gradient(t, teacher_needed);
  const Tensor student_scale_gradient = rows_like(s, student_index, student_needed),
               teacher_scale_gradient = rows_like(t, teacher_index, teacher_needed);
  const SortedL1Backward call{{student.rows, teacher.rows},
                              options_of(ties, top_k, tail),
                              {grad_of_student.const_data_ptr(), grad_of_teacher.const_data_ptr()},
                              {pointers<const void*>(of_student), pointers<const void*>(of_teacher)},
                              {student_gradient.written, teacher_gradient.written},
                              {student_scale_gradient.mutable_data_ptr(), teacher_scale_gradient.mutable_data_ptr()}};
  MLOT_SELECT(sorted_l1).backward[dtype_index(s)][dtype_index(t)](call, threads());
  return {student_gradient.tensor, student_scale_gradient, teacher_gradient.tensor, teacher_scale_gradient};
}

}  // namespace
}  // namespace mlot

#define MLOT_SIDE(side)                                                                        \
  "Tensor " side "_values, Tensor " side "_index, Tensor? " side "_column_mask, Tensor? " side \
  "_log_scale, float " side "_temperature, bool " side "_standardize, int " side "_vocab_size, "
#define MLOT_SAVED(side)                                                                                       \
  "Tensor " side "_peak, Tensor " side "_log_total, Tensor " side "_mean, Tensor " side "_scale, Tensor " side \
  "_slope, Tensor " side "_total, Tensor " side "_moment, Tensor " side "_steps, "
#define MLOT_OPTIONS "str ties, int top_k, str tail"
#define MLOT_EIGHT "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def("sorted_l1_forward(" MLOT_SIDE("student") MLOT_SIDE("teacher") MLOT_OPTIONS ") -> (Tensor, " MLOT_EIGHT
                                                                                          ", " MLOT_EIGHT ")");
  library.def("sorted_l1_backward(Tensor grad, " MLOT_SIDE("student") MLOT_SIDE("teacher") MLOT_OPTIONS ", " MLOT_SAVED(
      "student") MLOT_SAVED("teacher") "bool student_needed, bool teacher_needed) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("sorted_l1_forward", TORCH_BOX(&mlot::sorted_l1_forward));
  library.impl("sorted_l1_backward", TORCH_BOX(&mlot::sorted_l1_backward));
}
