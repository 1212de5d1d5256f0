// What the doors of pairwise_cost share: schemas, last guards.
#pragma once

#include "mlot/feature_rows.h"
#include "mlot/torch/tensors.h"

namespace mlot {

constexpr const char* kPairwiseCostForward = "pairwise_cost_forward(Tensor x, Tensor y, str metric) -> Tensor";
constexpr const char* kPairwiseCostBackward =
    "pairwise_cost_backward(Tensor grad, Tensor x, Tensor y, str metric, bool x_needed, bool y_needed) -> "
    "(Tensor, Tensor)";

inline FeatureRows feature_rows(const Tensor& side) {
  STD_TORCH_CHECK(side.dim() == 3, "features must be [B, rows, D]");
  return {.values = side.const_data_ptr(),
          .dtype = dtype_index(side),
          .rows = side.size(1),
          .problem_stride = side.stride(0),
          .row_stride = side.stride(1),
          .column_stride = side.stride(2)};
}

// Two sides, x for the rows of each problem's costs and y for their columns.
struct FeatureSides {
  FeatureRows x, y;
  int64_t problems, width;

  FeatureSides(const Tensor& x_, const Tensor& y_)
      : x(feature_rows(x_)), y(feature_rows(y_)), problems(x_.size(0)), width(x_.size(2)) {
    STD_TORCH_CHECK(x_.size(0) == y_.size(0) && x_.size(2) == y_.size(2), "x and y must have the same B and D");
  }
};

// The upstream gradient, contiguous and in the dtype of sums over both sides.
inline Tensor pairwise_upstream(const Tensor& grad, const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(grad.numel() == x.size(0) * x.size(1) * y.size(1), "grad must be [B, M, N]");
  return dense(grad, accumulator(x, y));
}

}  // namespace mlot
