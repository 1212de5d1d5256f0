// Two sides of feature vectors as kernels take them.
#pragma once

#include <string>

#include "common.h"
#include "mlot/cpu/pairwise_cost.h"

namespace mlot {

inline FeatureRows feature_rows(const Tensor& side) {
  STD_TORCH_CHECK(side.dim() == 3, "features must be [B, rows, D]");
  return {.values = side.const_data_ptr(),
          .dtype = dtype_index(side),
          .rows = side.size(1),
          .problem_stride = side.stride(0),
          .row_stride = side.stride(1),
          .column_stride = side.stride(2)};
}

inline FeaturePairs feature_pairs(const Tensor& x, const Tensor& y, const std::string& metric) {
  const FeatureRows rows = feature_rows(x), columns = feature_rows(y);
  STD_TORCH_CHECK(x.size(0) == y.size(0) && x.size(2) == y.size(2), "x and y must have the same B and D");
  const std::optional<Metric> chosen = metric_of(metric);
  STD_TORCH_CHECK(chosen, "metric must be l1, l2, sqeuclidean, cosine or cross_entropy");
  return {.x = rows, .y = columns, .problems = x.size(0), .width = x.size(2), .metric = *chosen};
}

}  // namespace mlot
