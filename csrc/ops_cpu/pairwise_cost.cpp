#include <string>
#include <tuple>

#include "features.h"

namespace mlot {
namespace {

Tensor pairwise_cost_forward(const Tensor& x, const Tensor& y, const std::string& metric) {
  const FeaturePairs pairs = feature_pairs(x, y, metric);
  const ScalarType dtype = accumulator(x, y);
  const Tensor cost = torch::stable::new_empty(x, {x.size(0), x.size(1), y.size(1)}, dtype);
  MLOT_SELECT(pairwise_cost).forward[dtype == ScalarType::Double]({pairs, prefault_hint(cost)}, threads());
  return cost;
}

std::tuple<Tensor, Tensor> pairwise_cost_backward(const Tensor& grad, const Tensor& x, const Tensor& y,
                                                  const std::string& metric, bool x_needed, bool y_needed) {
  const FeaturePairs pairs = feature_pairs(x, y, metric);
  const ScalarType dtype = accumulator(x, y);
  const Tensor upstream = pairwise_upstream(grad, x, y);
  const SideGradient grad_x(x, x_needed), grad_y(y, y_needed);
  const PairwiseCostBackward call{.pairs = pairs,
                                  .grad = upstream.const_data_ptr(),
                                  .threads = int64_t(torch::stable::get_num_threads()),
                                  .grad_x = grad_x.written,
                                  .grad_y = grad_y.written};
  MLOT_SELECT(pairwise_cost).backward[dtype == ScalarType::Double](call, threads());
  return {grad_x.tensor, grad_y.tensor};
}

}  // namespace
}  // namespace mlot

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def(mlot::kPairwiseCostForward);
  library.def(mlot::kPairwiseCostBackward);
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("pairwise_cost_forward", TORCH_BOX(&mlot::pairwise_cost_forward));
  library.impl("pairwise_cost_backward", TORCH_BOX(&mlot::pairwise_cost_backward));
}
