// Two sides of feature vectors as kernels take them.
#pragma once

#include <string>

#include "common.h"
#include "mlot/cpu/pairwise_cost.h"
#include "mlot/torch/pairwise_cost.h"

namespace mlot {

inline FeaturePairs feature_pairs(const Tensor& x, const Tensor& y, const std::string& metric) {
  const FeatureSides sides(x, y);
  const std::optional<Metric> chosen = metric_of(metric);
  STD_TORCH_CHECK(chosen, "metric must be l1, l2, sqeuclidean, cosine or cross_entropy");
  return {.x = sides.x, .y = sides.y, .problems = sides.problems, .width = sides.width, .metric = *chosen};
}

}  // namespace mlot
