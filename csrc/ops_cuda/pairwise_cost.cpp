#include "mlot/cuda/pairwise_cost.h"

#include <string>
#include <tuple>

#include "common.h"
#include "mlot/torch/pairwise_cost.h"

namespace mlot::cuda {
namespace {

void check_metric(const std::string& metric) { STD_TORCH_CHECK(metric == "l1", "metric must be l1"); }

// One side as the kernels take it: in the other's dtype or, where the two differ, both in that of sums over both; its
// columns neighbours, for which it is copied if it must be.
Tensor prepared(const Tensor& side, const Tensor& other) {
  const bool alike = side.scalar_type() == other.scalar_type();
  const Tensor widened = alike ? side : torch::stable::to(side, accumulator(side, other));
  return widened.size(2) <= 1 || widened.stride(2) == 1 ? widened : dense(widened);
}

Tensor pairwise_cost_forward(const Tensor& x, const Tensor& y, const std::string& metric) {
  const OnDevice on(x);
  check_metric(metric);
  const Tensor rows = prepared(x, y), columns = prepared(y, x);
  const FeatureSides sides(rows, columns);
  const Tensor cost = torch::stable::new_empty(x, {x.size(0), x.size(1), y.size(1)}, accumulator(x, y));
  const PairwiseCostForward call{
      .x = sides.x, .y = sides.y, .problems = sides.problems, .width = sides.width, .cost = cost.mutable_data_ptr()};
  pairwise_cost.forward[sides.x.dtype](call, on.stream);
  return cost;
}

std::tuple<Tensor, Tensor> pairwise_cost_backward(const Tensor& grad, const Tensor& x, const Tensor& y,
                                                  const std::string& metric, bool x_needed, bool y_needed) {
  const OnDevice on(x);
  check_metric(metric);
  const Tensor rows = prepared(x, y), columns = prepared(y, x);
  const FeatureSides sides(rows, columns);
  const Tensor upstream = pairwise_upstream(grad, x, y);
  const int64_t M = sides.x.rows, N = sides.y.rows;

  const auto gradient_of = [&](const Tensor& side, bool needed, const FeatureRows& own, const FeatureRows& other,
                               int64_t own_stride, int64_t other_stride) {
    if (!needed) return torch::stable::new_empty(side, {0});
    const int64_t parts = pairwise_cost_gradient.parts[own.dtype](own.rows, other.rows, sides.width);
    const Tensor room = torch::stable::new_empty(side, {parts > 1 ? parts * side.numel() : 0}, accumulator(x, y));
    const Tensor gradient = torch::stable::new_empty(side, side.sizes(), rows.scalar_type());
    const PairwiseCostBackward call{.own = own,
                                    .other = other,
                                    .problems = sides.problems,
                                    .width = sides.width,
                                    .grad = upstream.const_data_ptr(),
                                    .own_stride = own_stride,
                                    .other_stride = other_stride,
                                    .parts = room.mutable_data_ptr(),
                                    .gradient = gradient.mutable_data_ptr()};
    pairwise_cost_gradient.backward[own.dtype](call, on.stream);
    return torch::stable::to(gradient, side.scalar_type());
  };
  return {gradient_of(x, x_needed, sides.x, sides.y, N, 1), gradient_of(y, y_needed, sides.y, sides.x, 1, N)};
}

}  // namespace
}  // namespace mlot::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cuda, library) {
  library.def(mlot::kPairwiseCostForward);
  library.def(mlot::kPairwiseCostBackward);
}

MLOT_CUDA_IMPLEMENTATIONS(library) {
  library.impl("pairwise_cost_forward", TORCH_BOX(&mlot::cuda::pairwise_cost_forward));
  library.impl("pairwise_cost_backward", TORCH_BOX(&mlot::cuda::pairwise_cost_backward));
}
