#include "mlot/cpu/pairwise_cost.h"

#include <string>
#include <tuple>

#include "common.h"

namespace mlot {
namespace {

FeatureRows feature_rows(const Tensor& side) {
  STD_TORCH_CHECK(side.dim() == 3, "features must be [B, rows, D]");
  return {.values = side.const_data_ptr(),
          .dtype = dtype_index(side),
          .rows = side.size(1),
          .problem_stride = side.stride(0),
          .row_stride = side.stride(1),
          .column_stride = side.stride(2)};
}

FeaturePairs feature_pairs(const Tensor& x, const Tensor& y, const std::string& metric) {
  const FeatureRows rows = feature_rows(x), columns = feature_rows(y);
  STD_TORCH_CHECK(x.size(0) == y.size(0) && x.size(2) == y.size(2), "x and y must have the same B and D");
  const std::optional<Metric> chosen = metric_of(metric);
  STD_TORCH_CHECK(chosen, "metric must be l1, l2, sqeuclidean, cosine or cross_entropy");
  return {.x = rows, .y = columns, .problems = x.size(0), .width = x.size(2), .metric = *chosen};
}

bool is_double(const Tensor& x, const Tensor& y) {
  return accumulator(x) == ScalarType::Double || accumulator(y) == ScalarType::Double;
}

Tensor pairwise_cost_forward(const Tensor& x, const Tensor& y, const std::string& metric) {
  const FeaturePairs pairs = feature_pairs(x, y, metric);
  const bool wide = is_double(x, y);
  const Tensor cost = torch::stable::new_empty(x, {x.size(0), x.size(1), y.size(1)},
                                               wide ? ScalarType::Double : ScalarType::Float);
  MLOT_SELECT(pairwise_cost).forward[wide]({pairs, prefault_hint(cost)}, threads());
  return cost;
}

std::tuple<Tensor, Tensor> pairwise_cost_backward(const Tensor& grad, const Tensor& x, const Tensor& y,
                                                  const std::string& metric, bool x_needed, bool y_needed) {
  const FeaturePairs pairs = feature_pairs(x, y, metric);
  const bool wide = is_double(x, y);
  STD_TORCH_CHECK(grad.numel() == x.size(0) * x.size(1) * y.size(1), "grad must be [B, M, N]");
  const Tensor upstream = dense(grad, wide ? ScalarType::Double : ScalarType::Float);
  const auto fresh = [](const Tensor& side, bool needed) {
    return needed ? torch::stable::new_empty(side, side.sizes()) : torch::stable::new_empty(side, {0});
  };
  const Tensor grad_x = fresh(x, x_needed), grad_y = fresh(y, y_needed);
  const PairwiseCostBackward call{.pairs = pairs,
                                  .grad = upstream.const_data_ptr(),
                                  .threads = int64_t(torch::stable::get_num_threads()),
                                  .grad_x = x_needed ? prefault_hint(grad_x) : nullptr,
                                  .grad_y = y_needed ? prefault_hint(grad_y) : nullptr};
  MLOT_SELECT(pairwise_cost).backward[wide](call, threads());
  return {grad_x, grad_y};
}

}  // namespace
}  // namespace mlot

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def("pairwise_cost_forward(Tensor x, Tensor y, str metric) -> Tensor");
  library.def(
      "pairwise_cost_backward(Tensor grad, Tensor x, Tensor y, str metric, bool x_needed, bool y_needed) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("pairwise_cost_forward", TORCH_BOX(&mlot::pairwise_cost_forward));
  library.impl("pairwise_cost_backward", TORCH_BOX(&mlot::pairwise_cost_backward));
}
