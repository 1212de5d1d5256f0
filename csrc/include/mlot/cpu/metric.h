// The metrics of the operators that compare feature vectors; formulas: mlot_kernels/ops/pairwise_cost/README.md.
#pragma once

#include <optional>
#include <string_view>

namespace mlot {

enum class Metric { l1, l2, sqeuclidean, cosine, cross_entropy };

inline std::optional<Metric> metric_of(std::string_view name) {
  if (name == "l1") return Metric::l1;
  if (name == "l2") return Metric::l2;
  if (name == "sqeuclidean") return Metric::sqeuclidean;
  if (name == "cosine") return Metric::cosine;
  if (name == "cross_entropy") return Metric::cross_entropy;
  return std::nullopt;
}

}  // namespace mlot
