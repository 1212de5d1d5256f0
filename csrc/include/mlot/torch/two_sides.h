// What the doors of operators share that compare a student's rows with a teacher's, row by row.
#pragma once

#include <array>
#include <cstddef>
#include <tuple>
#include <type_traits>

#include "mlot/torch/tensors.h"

namespace mlot {

// A side in the schema of forward and backward, and what each of them has saved of it in front of what is its own.
#define MLOT_SIDE(side)                                                                        \
  "Tensor " side "_values, Tensor " side "_index, Tensor? " side "_column_mask, Tensor? " side \
  "_log_scale, float " side "_temperature, bool " side "_standardize, int " side "_vocab_size, "
#define MLOT_SAVED(side)                                                                                       \
  "Tensor " side "_peak, Tensor " side "_log_total, Tensor " side "_mean, Tensor " side "_scale, Tensor " side \
  "_slope, Tensor " side "_total, Tensor " side "_moment, "
#define MLOT_GRADIENTS_OF_SIDES "(Tensor, Tensor, Tensor, Tensor)"

using GradientsOfSides = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of values and log scale, the student's first

// Of a library's LogitsRows.
template <class Rows>
void check_pair(const Rows& student, const Rows& teacher) {
  STD_TORCH_CHECK(student.sequences == teacher.sequences && student.slots == teacher.slots,
                  "both sides must have the same rows [B, A]");
}

// A side's tensors as kernels take them: a Saved<void*> or Saved<const void*> with a member for each.
template <template <class> class Saved, class Pointer, size_t kCount>
Saved<Pointer> pointers_of(const std::array<Tensor, kCount>& saved) {
  const auto at = [](const Tensor& tensor) -> Pointer {
    if constexpr (std::is_const_v<std::remove_pointer_t<Pointer>>) {
      return tensor.const_data_ptr();
    } else {
      return tensor.mutable_data_ptr();
    }
  };
  return std::apply([&](const auto&... tensors) { return Saved<Pointer>{at(tensors)...}; }, saved);
}

// [B, A] in the dtype of the side's accumulator, with more elements of each row where `each` says so.
inline Tensor new_rows(const Tensor& values, const Tensor& index) {
  return torch::stable::new_empty(values, index.sizes(), accumulator(values));
}
inline Tensor dense_rows(const Tensor& tensor, const Tensor& values, const Tensor& index, int64_t each = 1) {
  STD_TORCH_CHECK(tensor.numel() == index.numel() * each, "grad and what forward saved must be [B, A]",
                  each == 1 ? "" : ", steps [B, A, 64, 2]");
  return dense(tensor, accumulator(values));
}

// Backward's tensors of one side but for the logits, contiguous, and the gradient of its log scale, empty where it
// needs none; that of the logits is the caller's to allocate. The last of the saved has `each` elements for each row.
template <size_t kCount>
struct GivenSide {
  Tensor grad;
  std::array<Tensor, kCount> saved;
  Tensor grad_log_scale;

  GivenSide(const Tensor& values, const Tensor& index, bool needed, const Tensor& grad_,
            const std::array<Tensor, kCount>& given, int64_t each = 1)
      : grad(dense_rows(grad_, values, index)),
        saved(given),
        grad_log_scale(needed ? new_rows(values, index) : torch::stable::new_empty(values, {0}, accumulator(values))) {
    for (size_t i = 0; i < kCount; ++i) saved[i] = dense_rows(given[i], values, index, i + 1 == kCount ? each : 1);
  }
};

}  // namespace mlot
