// What the doors of row_divergence share: schemas, last guards, the call's options.
#pragma once

#include <array>
#include <string>
#include <utility>

#include "mlot/divergence.h"
#include "mlot/torch/tensors.h"

namespace mlot {

constexpr const char* kRowDivergenceForward =
    "row_divergence_forward(Tensor student_values, Tensor student_index, Tensor? student_column_mask, "
    "Tensor? student_log_scale, float student_temperature, bool student_standardize, int student_vocab_size, "
    "Tensor teacher_values, Tensor teacher_index, Tensor? teacher_column_mask, Tensor? teacher_log_scale, "
    "float teacher_temperature, bool teacher_standardize, int teacher_vocab_size, Tensor? column_pairs, str kind, "
    "float beta, float skew, float head, float interpolation) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor, Tensor, Tensor)";
constexpr const char* kRowDivergenceBackward =
    "row_divergence_backward(Tensor grad, Tensor student_values, Tensor student_index, Tensor? student_column_mask, "
    "Tensor? student_log_scale, float student_temperature, bool student_standardize, int student_vocab_size, "
    "Tensor teacher_values, Tensor teacher_index, Tensor? teacher_column_mask, Tensor? teacher_log_scale, "
    "float teacher_temperature, bool teacher_standardize, int teacher_vocab_size, Tensor? column_pairs, str kind, "
    "float beta, float skew, float head, float interpolation, Tensor student_peak, Tensor student_log_total, "
    "Tensor student_mean, Tensor student_scale, Tensor student_slope, Tensor student_total, Tensor student_moment, "
    "Tensor teacher_peak, Tensor teacher_log_total, Tensor teacher_mean, Tensor teacher_scale, Tensor teacher_slope, "
    "Tensor teacher_total, Tensor teacher_moment, Tensor share, Tensor target_log_total, bool student_needed, "
    "bool teacher_needed) -> (Tensor, Tensor, Tensor, Tensor)";

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
                      double head, double interpolation, int64_t student_vocab_size, int64_t teacher_vocab_size)
      : value{divergence_kind(kind), beta, skew, head, interpolation, nullptr, 0} {
    STD_TORCH_CHECK(column_pairs || student_vocab_size == teacher_vocab_size, "vocabularies must have one size");
    STD_TORCH_CHECK(interpolation == 1 || (value.kind == DivergenceKind::forward_kl && !column_pairs),
                    "interpolation needs forward_kl and whole vocabularies");
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

// A side's seven scalars, in the order of the schema.
using DivergenceScalars = std::array<Tensor, 7>;

}  // namespace mlot
