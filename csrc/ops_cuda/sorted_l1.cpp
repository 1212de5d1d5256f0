#include "mlot/cuda/sorted_l1.h"

#include <string>

#include "common.h"
#include "mlot/torch/sorted_l1.h"

namespace mlot::cuda {
namespace {

// Where clusters sort, on the device of `values`.
struct RoomTensor {
  Tensor tensor;
  SortRoom room;

  RoomTensor(const Tensor& values, const SortRoom& needed)
      : tensor(torch::stable::new_empty(values, {needed.clusters * needed.each}, ScalarType::Byte)), room(needed) {
    room.memory = static_cast<unsigned char*>(tensor.mutable_data_ptr());
  }
};

SortedL1Outputs sorted_l1_forward(const Tensor& student_values, const Tensor& student_index,
                                  const std::optional<Tensor>& student_column_mask,
                                  const std::optional<Tensor>& student_log_scale, double student_temperature,
                                  bool student_standardize, int64_t student_vocab_size, const Tensor& teacher_values,
                                  const Tensor& teacher_index, const std::optional<Tensor>& teacher_column_mask,
                                  const std::optional<Tensor>& teacher_log_scale, double teacher_temperature,
                                  bool teacher_standardize, int64_t teacher_vocab_size, const std::string& ties,
                                  int64_t top_k, const std::string& tail) {
  const OnDevice on(student_values);
  const LogitsArguments student(student_values, student_index, student_column_mask, student_log_scale,
                                student_temperature, student_standardize, student_vocab_size);
  const LogitsArguments teacher(teacher_values, teacher_index, teacher_column_mask, teacher_log_scale,
                                teacher_temperature, teacher_standardize, teacher_vocab_size);
  check_sorted_l1_pair(student.rows, teacher.rows);
  const SortedL1Made made(student_values, teacher_values, student_index);
  const RoomTensor room(student_values,
                        room_of_forward({student.rows, teacher.rows}, {int64_t(student_values.element_size()),
                                                                       int64_t(teacher_values.element_size())}));
  const Tensor s_expected =
                   torch::stable::new_empty(student_values, student_index.sizes(), accumulator(student_values)),
               t_expected =
                   torch::stable::new_empty(teacher_values, teacher_index.sizes(), accumulator(teacher_values));
  const SortedL1Forward call{
      .sides = {student.rows, teacher.rows},
      .options = sorted_l1_options(ties, top_k, tail),
      .room = room.room,
      .loss = made.loss.mutable_data_ptr(),
      .expected = {s_expected.mutable_data_ptr(), t_expected.mutable_data_ptr()},
      .saved = {pointers_of<SortedL1Saved, void*>(made.student), pointers_of<SortedL1Saved, void*>(made.teacher)}};
  sorted_l1.forward[dtype_index(student_values)][dtype_index(teacher_values)](call, on.stream);
  return made.outputs();
}

// A side's gradient of its logits; empty where it needs none.
struct SideOfBackward {
  const Tensor& values;
  const LogitsRows& rows;
  const SortedL1GivenSide& given;
  Tensor grad_values;

  SideOfBackward(const Tensor& values_, const LogitsRows& rows_, const SortedL1GivenSide& given_, bool needed)
      : values(values_),
        rows(rows_),
        given(given_),
        grad_values(needed ? torch::stable::new_empty(values, values.sizes()) : torch::stable::new_empty(values, {0})) {
  }

  void run(const SideOfBackward& other, const SortedL1Options& options, void* stream) const {
    const RoomTensor room(
        values, room_of_backward({rows, other.rows},
                                 {int64_t(values.element_size()), int64_t(other.values.element_size())}, options));
    const Tensor slot_of = torch::stable::new_empty(values, {values.size(0), values.size(1)}, ScalarType::Int);
    const SortedL1Backward call{.rows = rows,
                                .other = other.rows,
                                .options = options,
                                .room = room.room,
                                .grad = given.grad.const_data_ptr(),
                                .saved = pointers_of<SortedL1Saved, const void*>(given.saved),
                                .other_saved = pointers_of<SortedL1Saved, const void*>(other.given.saved),
                                .grad_values = grad_values.mutable_data_ptr(),
                                .grad_log_scale = given.grad_log_scale.mutable_data_ptr(),
                                .slot_of = static_cast<int32_t*>(slot_of.mutable_data_ptr())};
    sorted_l1.backward[dtype_index(values)][dtype_index(other.values)](call, stream);
  }
};

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
  const OnDevice on(student_values);
  const LogitsArguments student(student_values, student_index, student_column_mask, student_log_scale,
                                student_temperature, student_standardize, student_vocab_size);
  const LogitsArguments teacher(teacher_values, teacher_index, teacher_column_mask, teacher_log_scale,
                                teacher_temperature, teacher_standardize, teacher_vocab_size);
  check_sorted_l1_pair(student.rows, teacher.rows);
  const SortedL1Options options = sorted_l1_options(ties, top_k, tail);
  const SortedL1GivenSide of_student(student_values, student_index, student_needed, grad,
                                     {student_peak, student_log_total, student_mean, student_scale, student_slope,
                                      student_total, student_moment, student_steps}),
      of_teacher(teacher_values, teacher_index, teacher_needed, grad,
                 {teacher_peak, teacher_log_total, teacher_mean, teacher_scale, teacher_slope, teacher_total,
                  teacher_moment, teacher_steps});
  const SideOfBackward s(student_values, student.rows, of_student, student_needed),
      t(teacher_values, teacher.rows, of_teacher, teacher_needed);
  if (student_needed) s.run(t, options, on.stream);
  if (teacher_needed) t.run(s, options, on.stream);
  return {s.grad_values, of_student.grad_log_scale, t.grad_values, of_teacher.grad_log_scale};
}

}  // namespace
}  // namespace mlot::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cuda, library) {
  library.def(mlot::kSortedL1Forward);
  library.def(mlot::kSortedL1Backward);
}

MLOT_CUDA_IMPLEMENTATIONS(library) {
  library.impl("sorted_l1_forward", TORCH_BOX(&mlot::cuda::sorted_l1_forward));
  library.impl("sorted_l1_backward", TORCH_BOX(&mlot::cuda::sorted_l1_backward));
}
