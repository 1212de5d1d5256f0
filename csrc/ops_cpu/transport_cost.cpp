#include "mlot/cpu/transport_cost.h"

#include <tuple>

#include "features.h"
#include "transport.h"

namespace mlot {
namespace {

TransportCostOutputs transport_cost_forward(const Tensor& x, const Tensor& y, const std::optional<Tensor>& row_marginal,
                                            const std::optional<Tensor>& column_marginal,
                                            const std::optional<Tensor>& row_lengths,
                                            const std::optional<Tensor>& column_lengths,
                                            const std::optional<Tensor>& column_weight, const std::string& metric,
                                            double epsilon, int64_t iterations, const std::string& marginals,
                                            double tolerance, const std::string& domain, const std::string& gradient) {
  const FeaturePairs pairs = feature_pairs(x, y, metric);
  const ScalarType wide = accumulator(x, y);
  const TransportArguments arguments(pairs.problems, pairs.x.rows, pairs.y.rows, wide, row_marginal, column_marginal,
                                     row_lengths, column_lengths, column_weight, epsilon, iterations, marginals,
                                     tolerance, domain, gradient);
  const TransportTensors outputs(x, wide, arguments.options);
  MLOT_SELECT(transport_cost)
      .forward[wide == ScalarType::Double]({pairs, arguments.options, outputs.pointers(arguments.options)}, threads());
  return {outputs.transported, outputs.regularized, outputs.row_potential, outputs.column_potential,
          outputs.done,        outputs.row_history, outputs.column_history};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> transport_cost_backward(
    const Tensor& grad_transported, const Tensor& grad_regularized, const Tensor& x, const Tensor& y,
    const std::optional<Tensor>& row_marginal, const std::optional<Tensor>& column_marginal,
    const std::optional<Tensor>& row_lengths, const std::optional<Tensor>& column_lengths,
    const std::optional<Tensor>& column_weight, const std::string& metric, double epsilon, int64_t iterations,
    const std::string& marginals, double tolerance, const std::string& domain, const std::string& gradient,
    const Tensor& row_potential, const Tensor& column_potential, const Tensor& done, const Tensor& row_history,
    const Tensor& column_history, bool x_needed, bool y_needed) {
  const FeaturePairs pairs = feature_pairs(x, y, metric);
  const ScalarType wide = accumulator(x, y);
  const TransportArguments arguments(pairs.problems, pairs.x.rows, pairs.y.rows, wide, row_marginal, column_marginal,
                                     row_lengths, column_lengths, column_weight, epsilon, iterations, marginals,
                                     tolerance, domain, gradient);
  const TransportBackwardTensors tensors(arguments.options, wide, grad_transported, grad_regularized, row_potential,
                                         column_potential, done, row_history, column_history);
  check_steps(tensors.done, arguments.options);
  const SideGradient grad_x(x, x_needed), grad_y(y, y_needed);
  const TransportCostBackward call{tensors.upstream(), pairs,          arguments.options,  tensors.saved(),
                                   grad_x.written,     grad_y.written, tensors.gradients()};
  MLOT_SELECT(transport_cost).backward[wide == ScalarType::Double](call, threads());
  return {grad_x.tensor, grad_y.tensor, tensors.grad_row_marginal, tensors.grad_column_marginal,
          tensors.grad_column_weight};
}

}  // namespace
}  // namespace mlot

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def(mlot::kTransportCostForward);
  library.def(mlot::kTransportCostBackward);
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("transport_cost_forward", TORCH_BOX(&mlot::transport_cost_forward));
  library.impl("transport_cost_backward", TORCH_BOX(&mlot::transport_cost_backward));
}
