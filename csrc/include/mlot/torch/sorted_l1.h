// What the doors of sorted_l1 share: schemas, last guards, outputs.
#pragma once

#include <array>
#include <string>
#include <tuple>
#include <type_traits>

#include "mlot/sorted_l1.h"
#include "mlot/torch/tensors.h"

namespace mlot {

#define MLOT_SIDE(side)                                                                        \
  "Tensor " side "_values, Tensor " side "_index, Tensor? " side "_column_mask, Tensor? " side \
  "_log_scale, float " side "_temperature, bool " side "_standardize, int " side "_vocab_size, "
#define MLOT_SAVED(side)                                                                                       \
  "Tensor " side "_peak, Tensor " side "_log_total, Tensor " side "_mean, Tensor " side "_scale, Tensor " side \
  "_slope, Tensor " side "_total, Tensor " side "_moment, Tensor " side "_steps, "
#define MLOT_EIGHT "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"

constexpr const char* kSortedL1Forward = "sorted_l1_forward(" MLOT_SIDE("student")
    MLOT_SIDE("teacher") "str ties, int top_k, str tail) -> (Tensor, " MLOT_EIGHT ", " MLOT_EIGHT ")";
constexpr const char* kSortedL1Backward = "sorted_l1_backward(Tensor grad, " MLOT_SIDE("student")
    MLOT_SIDE("teacher") "str ties, int top_k, str tail, " MLOT_SAVED("student")
        MLOT_SAVED("teacher") "bool student_needed, bool teacher_needed) -> (Tensor, Tensor, Tensor, Tensor)";

#undef MLOT_EIGHT
#undef MLOT_SAVED
#undef MLOT_SIDE

using SortedL1Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                   Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using SortedL1Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

using SavedOfSide = std::array<Tensor, 8>;  // as SortedL1Saved has them

template <class Pointer>
SortedL1Saved<Pointer> pointers_of(const SavedOfSide& saved) {
  const auto at = [&](int i) {
    if constexpr (std::is_const_v<std::remove_pointer_t<Pointer>>) {
      return saved[i].const_data_ptr();
    } else {
      return saved[i].mutable_data_ptr();
    }
  };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
}

inline SortedL1Options sorted_l1_options(const std::string& ties, int64_t top_k, const std::string& tail) {
  STD_TORCH_CHECK(ties == "mean" || ties == "stable", "ties must be mean or stable");
  STD_TORCH_CHECK(tail == "bucket" || tail == "drop", "tail must be bucket or drop");
  STD_TORCH_CHECK(top_k >= 1, "top_k must be at least 1");
  return {ties == "mean", top_k, tail == "bucket"};
}

// Of a library's LogitsRows.
template <class Rows>
void check_sorted_l1_pair(const Rows& student, const Rows& teacher) {
  constexpr int64_t kMostColumns = (int64_t(1) << 31) - 1;  // the kernels count columns in 32 bits
  STD_TORCH_CHECK(student.sequences == teacher.sequences && student.slots == teacher.slots,
                  "both sides must have the same rows [B, A]");
  STD_TORCH_CHECK(student.vocab_size <= kMostColumns && teacher.vocab_size <= kMostColumns, "at most 2^31 - 1 columns");
}

// Forward's outputs.
struct SortedL1Made {
  Tensor loss;
  SavedOfSide student, teacher;

  SortedL1Made(const Tensor& student_values, const Tensor& teacher_values, const Tensor& index)
      : loss(torch::stable::new_empty(student_values, index.sizes(), accumulator(student_values, teacher_values))),
        student(of_side(student_values, index)),
        teacher(of_side(teacher_values, index)) {}

  SortedL1Outputs outputs() const {
    return std::tuple_cat(std::tuple(loss), std::tuple_cat(student), std::tuple_cat(teacher));
  }

 private:
  static SavedOfSide of_side(const Tensor& values, const Tensor& index) {
    const auto row = [&] { return torch::stable::new_empty(values, index.sizes(), accumulator(values)); };
    return {
        row(), row(),
        row(), row(),
        row(), row(),
        row(), torch::stable::new_empty(values, {index.size(0), index.size(1), kSavedSteps, 2}, accumulator(values))};
  }
};

// Backward's tensors of one side but for the logits, contiguous, and its gradients, empty where it needs none; those of
// the logits are the caller's to allocate.
struct SortedL1GivenSide {
  Tensor grad;
  SavedOfSide saved;
  Tensor grad_log_scale;

  SortedL1GivenSide(const Tensor& values, const Tensor& index, bool needed, const Tensor& grad_,
                    const SavedOfSide& given)
      : grad(of_rows(grad_, values, index)),
        saved{of_rows(given[0], values, index), of_rows(given[1], values, index),
              of_rows(given[2], values, index), of_rows(given[3], values, index),
              of_rows(given[4], values, index), of_rows(given[5], values, index),
              of_rows(given[6], values, index), of_rows(given[7], values, index, 2 * kSavedSteps)},
        grad_log_scale(needed ? torch::stable::new_empty(values, index.sizes(), accumulator(values))
                              : torch::stable::new_empty(values, {0}, accumulator(values))) {}

 private:
  static Tensor of_rows(const Tensor& tensor, const Tensor& values, const Tensor& index, int64_t each = 1) {
    STD_TORCH_CHECK(tensor.numel() == index.numel() * each,
                    "grad and what forward saved must be [B, A], steps [B, A, 64, 2]");
    return dense(tensor, accumulator(values));
  }
};

}  // namespace mlot
