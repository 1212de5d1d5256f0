// What the doors of row_divergence share: schemas, last guards, the call's options.
#pragma once

#include <array>
#include <string>
#include <tuple>

#include "mlot/divergence.h"
#include "mlot/torch/two_sides.h"

namespace mlot {

#define MLOT_OPTIONS \
  "Tensor? column_pairs, str kind, float beta, float skew, float head, float interpolation, float floor"
#define MLOT_SEVEN "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"

constexpr const char* kRowDivergenceForward = "row_divergence_forward(" MLOT_SIDE("student") MLOT_SIDE("teacher")
    MLOT_OPTIONS ") -> (Tensor, " MLOT_SEVEN ", " MLOT_SEVEN ", Tensor, Tensor)";
constexpr const char* kRowDivergenceBackward = "row_divergence_backward(Tensor grad, " MLOT_SIDE("student")
    MLOT_SIDE("teacher") MLOT_OPTIONS ", " MLOT_SAVED("student") MLOT_SAVED("teacher")
        "Tensor share, Tensor target_log_total, bool student_needed, bool teacher_needed) -> " MLOT_GRADIENTS_OF_SIDES;

#undef MLOT_SEVEN
#undef MLOT_OPTIONS

using RowDivergenceOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                        Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline DivergenceKind divergence_kind(const std::string& kind) {
  constexpr std::array kNames{"forward_kl", "reverse_kl",      "jsd",        "total_variation",
                              "skew_kl",    "skew_reverse_kl", "adaptive_kl"};
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (kind == kNames[i]) return DivergenceKind(i);
  }
  STD_TORCH_CHECK(false, "kind must be a divergence that mlot_kernels.row_divergence names");
}

// Holds the contiguous copy that `value` points into.
struct DivergenceArguments {
  std::optional<Tensor> pairs;
  DivergenceOptions value;

  DivergenceArguments(const std::optional<Tensor>& column_pairs, const std::string& kind, double beta, double skew,
                      double head, double interpolation, double floor, int64_t student_vocab_size,
                      int64_t teacher_vocab_size)
      : value{divergence_kind(kind), beta, skew, head, interpolation, floor, nullptr, 0} {
    STD_TORCH_CHECK(column_pairs || student_vocab_size == teacher_vocab_size, "vocabularies must have one size");
    STD_TORCH_CHECK(interpolation == 1 || (value.kind == DivergenceKind::forward_kl && !column_pairs),
                    "interpolation needs forward_kl and whole vocabularies");
    STD_TORCH_CHECK(floor == 0 || (interpolation == 1 && value.kind != DivergenceKind::adaptive_kl),
                    "a floor needs an interpolation of 1 and another kind than adaptive_kl");
    if (!column_pairs) return;
    STD_TORCH_CHECK(
        column_pairs->scalar_type() == ScalarType::Long && column_pairs->dim() == 2 && column_pairs->size(1) == 2,
        "column_pairs must be int64 [P, 2]");
    pairs = dense(*column_pairs);
    static constexpr int64_t kNone[2] = {};  // no pair at all is not every column
    value.pair_count = pairs->size(0);
    value.pairs = value.pair_count ? static_cast<const int64_t*>(pairs->const_data_ptr()) : kNone;
  }

  DivergenceArguments(const DivergenceArguments&) = delete;  // `value` points into its member
};

using ScalarsOfSide = std::array<Tensor, 7>;  // as DivergenceSaved has them

// Forward's outputs.
struct RowDivergenceMade {
  Tensor loss, share, target_log_total;
  ScalarsOfSide student, teacher;

  RowDivergenceMade(const Tensor& student_values, const Tensor& teacher_values, const Tensor& index)
      : loss(of_both(student_values, teacher_values, index)),
        share(of_both(student_values, teacher_values, index)),
        target_log_total(of_both(student_values, teacher_values, index)),
        student(of_side(student_values, index)),
        teacher(of_side(teacher_values, index)) {}

  RowDivergenceOutputs outputs() const {
    return std::tuple_cat(std::tuple(loss), std::tuple_cat(student), std::tuple_cat(teacher),
                          std::tuple(share, target_log_total));
  }

 private:
  static Tensor of_both(const Tensor& student_values, const Tensor& teacher_values, const Tensor& index) {
    return torch::stable::new_empty(student_values, index.sizes(), accumulator(student_values, teacher_values));
  }
  static ScalarsOfSide of_side(const Tensor& values, const Tensor& index) {
    const auto row = [&] { return new_rows(values, index); };
    return {row(), row(), row(), row(), row(), row(), row()};
  }
};

// What forward left of both sides together, contiguous.
struct RowDivergenceGiven {
  Tensor share, target_log_total;

  RowDivergenceGiven(const Tensor& share_, const Tensor& target_log_total_, const Tensor& student_values,
                     const Tensor& teacher_values, const Tensor& index)
      : share(dense_rows(share_, wider(student_values, teacher_values), index)),
        target_log_total(dense_rows(target_log_total_, wider(student_values, teacher_values), index)) {}

 private:
  static const Tensor& wider(const Tensor& one, const Tensor& other) {
    return accumulator(one) == ScalarType::Double ? one : other;
  }
};

}  // namespace mlot
