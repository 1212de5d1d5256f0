// What the doors of sorted_l1 share: schemas, last guards, outputs.
#pragma once

#include <array>
#include <string>
#include <tuple>

#include "mlot/sorted_l1.h"
#include "mlot/torch/two_sides.h"

namespace mlot {

#define MLOT_EIGHT "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"

constexpr const char* kSortedL1Forward = "sorted_l1_forward(" MLOT_SIDE("student")
    MLOT_SIDE("teacher") "str ties, int top_k, str tail) -> (Tensor, " MLOT_EIGHT ", " MLOT_EIGHT ")";
constexpr const char* kSortedL1Backward = "sorted_l1_backward(Tensor grad, " MLOT_SIDE("student")
    MLOT_SIDE("teacher") "str ties, int top_k, str tail, " MLOT_SAVED("student") "Tensor student_steps, " MLOT_SAVED(
        "teacher") "Tensor teacher_steps, bool student_needed, bool teacher_needed) -> " MLOT_GRADIENTS_OF_SIDES;

#undef MLOT_EIGHT

using SortedL1Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                   Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

using SavedOfSide = std::array<Tensor, 8>;  // as SortedL1Saved has them

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
  check_pair(student, teacher);
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
    const auto row = [&] { return new_rows(values, index); };
    return {
        row(), row(),
        row(), row(),
        row(), row(),
        row(), torch::stable::new_empty(values, {index.size(0), index.size(1), kSavedSteps, 2}, accumulator(values))};
  }
};

struct SortedL1GivenSide : GivenSide<8> {
  SortedL1GivenSide(const Tensor& values, const Tensor& index, bool needed, const Tensor& grad_,
                    const SavedOfSide& given)
      : GivenSide(values, index, needed, grad_, given, 2 * kSavedSteps) {}
};

}  // namespace mlot
