// What the doors of rank_truncate share: schemas, last guards, outputs.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "mlot/rank_scope.h"
#include "mlot/torch/tensors.h"

namespace mlot {

constexpr const char* kRankTruncateForward =
    "rank_truncate_forward(Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, Tensor? given, "
    "float[] temperatures, bool standardize, int vocab_size, int k, str scope) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kRankTruncateBackward =
    "rank_truncate_backward(Tensor grad_log_probabilities, Tensor grad_kept_mass, Tensor values, Tensor index, "
    "Tensor? column_mask, Tensor columns, Tensor log_probabilities, Tensor peak, Tensor log_total, Tensor expected, "
    "Tensor mean, Tensor scale, Tensor slope, float[] temperatures, int vocab_size) -> (Tensor, Tensor)";

using RankTruncateOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline RankScope scope_of(const std::string& scope) {
  STD_TORCH_CHECK(scope == "sequence" || scope == "batch" || scope == "token",
                  "scope must be sequence, batch or token");
  return scope == "sequence" ? RankScope::sequence : scope == "batch" ? RankScope::batch : RankScope::token;
}

inline Tensor checked_columns(const Tensor& columns, const Tensor& index) {
  const int64_t B = index.size(0), A = index.size(1), dimensions = columns.dim();
  STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Long && (dimensions == 2 || dimensions == 3) &&
                      columns.size(0) == B && (dimensions == 2 || columns.size(1) == A),
                  "columns must be int64 [B, k] or [B, A, k]");
  return dense(columns);
}

// Forward's outputs, and the columns that were given, contiguous.
struct RankTruncateMade {
  std::optional<Tensor> given;
  RankScope scope;  // of given columns: token where each row has its own
  bool columns_of_each_row;
  Tensor log_probabilities, columns, kept_mass;
  SavedTensors saved;

  RankTruncateMade(const Tensor& values, const Tensor& index, const std::optional<Tensor>& given_, int64_t R,
                   int64_t vocab_size, int64_t k, const std::string& scope_name)
      : given(given_ ? std::optional(checked_columns(*given_, index)) : std::nullopt),
        scope(!given              ? scope_of(scope_name)
              : given->dim() == 3 ? RankScope::token
                                  : RankScope::sequence),
        columns_of_each_row(scope == RankScope::token),
        log_probabilities(fresh(values, {R, index.size(0), index.size(1), k})),
        columns(torch::stable::new_empty(values, shape_of_columns(index, k), ScalarType::Long)),
        kept_mass(fresh(values, {index.size(0), index.size(1)})),
        saved{fresh(values, {R, index.size(0), index.size(1)}), fresh(values, {R, index.size(0), index.size(1)}),
              fresh(values, {index.size(0), index.size(1)}),    fresh(values, {index.size(0), index.size(1)}),
              fresh(values, {index.size(0), index.size(1)}),    fresh(values, {index.size(0), index.size(1)})} {
    STD_TORCH_CHECK(k >= 1 && (given || k <= vocab_size), "k must be in 1..vocab_size");
    STD_TORCH_CHECK(vocab_size < int64_t(1) << 32, "at most 2^32 - 1 columns");
    STD_TORCH_CHECK(!given || given->size(given->dim() - 1) == k, "k must be the number of given columns");
  }

  RankTruncateOutputs outputs() const {
    const auto& [log_total, expected, peak, mean, scale, slope] = saved;
    return {log_probabilities, columns, kept_mass, peak, log_total, expected, mean, scale, slope};
  }

 private:
  static Tensor fresh(const Tensor& values, const std::vector<int64_t>& shape) {
    return torch::stable::new_empty(values, shape, accumulator(values));
  }

  std::vector<int64_t> shape_of_columns(const Tensor& index, int64_t k) const {
    if (columns_of_each_row) return {index.size(0), index.size(1), k};
    return {index.size(0), k};
  }
};

// Backward's tensors but for the logits, contiguous, and its outputs.
struct RankTruncateGiven {
  Tensor columns;
  int64_t k;
  Tensor grad_log_probabilities, grad_kept_mass, log_probabilities;
  SavedTensors saved;
  Tensor grad_values, grad_log_scale;

  RankTruncateGiven(const Tensor& grad_log_probabilities_, const Tensor& grad_kept_mass_, const Tensor& values,
                    const Tensor& index, const Tensor& columns_, const Tensor& log_probabilities_, const Tensor& peak,
                    const Tensor& log_total, const Tensor& expected, const Tensor& mean, const Tensor& scale,
                    const Tensor& slope, int64_t R)
      : columns(checked_columns(columns_, index)),
        k(columns.size(columns.dim() - 1)),
        grad_log_probabilities(of_columns(grad_log_probabilities_, values, R * index.numel() * k)),
        grad_kept_mass(of_rows(grad_kept_mass_, values, index.numel())),
        log_probabilities(of_columns(log_probabilities_, values, R * index.numel() * k)),
        saved{of_temperatures(log_total, values, R * index.numel()),
              of_temperatures(expected, values, R * index.numel()),
              of_rows(peak, values, index.numel()),
              of_rows(mean, values, index.numel()),
              of_rows(scale, values, index.numel()),
              of_rows(slope, values, index.numel())},
        grad_values(torch::stable::new_empty(values, values.sizes())),
        grad_log_scale(torch::stable::new_empty(values, index.sizes(), accumulator(values))) {}

 private:
  static Tensor sized(const Tensor& tensor, const Tensor& values, int64_t size, const char* message) {
    STD_TORCH_CHECK(tensor.numel() == size, message);
    return dense(tensor, accumulator(values));
  }
  static Tensor of_rows(const Tensor& tensor, const Tensor& values, int64_t size) {
    return sized(tensor, values, size, "scalars of the rows must be [B, A]");
  }
  static Tensor of_temperatures(const Tensor& tensor, const Tensor& values, int64_t size) {
    return sized(tensor, values, size, "log_total and expected must be [R, B, A]");
  }
  static Tensor of_columns(const Tensor& tensor, const Tensor& values, int64_t size) {
    return sized(tensor, values, size, "log_probabilities and their gradient must be [R, B, A, k]");
  }
};

}  // namespace mlot
