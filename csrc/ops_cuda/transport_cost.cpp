#include "mlot/cuda/transport_cost.h"

#include "mlot/torch/pairwise_cost.h"
#include "transport.h"

namespace mlot::cuda {
namespace {

// Both sides in one dtype, as the kernels take them: where they differ, in that of their sums.
struct SidesOfOneDtype {
  Tensor x, y;

  SidesOfOneDtype(const Tensor& x_, const Tensor& y_, const std::string& metric) : x(x_), y(y_) {
    STD_TORCH_CHECK(metric == "l1", "metric must be l1");
    if (x.scalar_type() == y.scalar_type()) return;
    x = torch::stable::to(x_, accumulator(x_, y_));
    y = torch::stable::to(y_, accumulator(x_, y_));
  }
};

TransportCostOutputs transport_cost_forward_of(
    const Tensor& x, const Tensor& y, const std::optional<Tensor>& row_marginal,
    const std::optional<Tensor>& column_marginal, const std::optional<Tensor>& row_lengths,
    const std::optional<Tensor>& column_lengths, const std::optional<Tensor>& column_weight, const std::string& metric,
    double epsilon, int64_t iterations, const std::string& marginals, double tolerance, const std::string& domain,
    const std::string& gradient) {
  const OnDevice on(x);
  const SidesOfOneDtype sides(x, y, metric);
  const FeatureSides pairs(sides.x, sides.y);
  const ScalarType wide = accumulator(x, y);
  const TransportArguments arguments(pairs.problems, pairs.x.rows, pairs.y.rows, wide, row_marginal, column_marginal,
                                     row_lengths, column_lengths, column_weight, epsilon, iterations, marginals,
                                     tolerance, domain, gradient);
  const TransportTensors outputs(x, wide, arguments.options);
  const TransportCostForward call{
      pairs.x, pairs.y, pairs.width, {{}, arguments.options, nullptr, outputs.pointers(arguments.options)}};
  const Tensor room = room_of(x, transport_cost_forward_room(arguments.options, bytes_of(wide)));
  transport_cost_forward[dtype_index(sides.x)](call, room.mutable_data_ptr(), on.stream);
  return {outputs.transported, outputs.regularized, outputs.row_potential, outputs.column_potential,
          outputs.done,        outputs.row_history, outputs.column_history};
}

// The gradient of a side, in the kernels' dtype; empty where it needs none.
Tensor gradient_of(const Tensor& side, bool needed) {
  return needed ? torch::stable::new_empty(side, side.sizes()) : torch::stable::new_empty(side, {0});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> transport_cost_backward_of(
    const Tensor& grad_transported, const Tensor& grad_regularized, const Tensor& x, const Tensor& y,
    const std::optional<Tensor>& row_marginal, const std::optional<Tensor>& column_marginal,
    const std::optional<Tensor>& row_lengths, const std::optional<Tensor>& column_lengths,
    const std::optional<Tensor>& column_weight, const std::string& metric, double epsilon, int64_t iterations,
    const std::string& marginals, double tolerance, const std::string& domain, const std::string& gradient,
    const Tensor& row_potential, const Tensor& column_potential, const Tensor& done, const Tensor& row_history,
    const Tensor& column_history, bool x_needed, bool y_needed) {
  const OnDevice on(x);
  const SidesOfOneDtype sides(x, y, metric);
  const FeatureSides pairs(sides.x, sides.y);
  const ScalarType wide = accumulator(x, y);
  const TransportArguments arguments(pairs.problems, pairs.x.rows, pairs.y.rows, wide, row_marginal, column_marginal,
                                     row_lengths, column_lengths, column_weight, epsilon, iterations, marginals,
                                     tolerance, domain, gradient);
  const TransportBackwardTensors tensors(arguments.options, wide, grad_transported, grad_regularized, row_potential,
                                         column_potential, done, row_history, column_history);
  const Tensor grad_x = gradient_of(sides.x, x_needed), grad_y = gradient_of(sides.y, y_needed);
  const TransportCostBackward call{
      pairs.x,
      pairs.y,
      pairs.width,
      {tensors.upstream(), nullptr, {}, arguments.options, tensors.saved(), nullptr, tensors.gradients()},
      x_needed ? grad_x.mutable_data_ptr() : nullptr,
      y_needed ? grad_y.mutable_data_ptr() : nullptr};
  const Tensor room = room_of(x, transport_cost_backward_room(arguments.options, bytes_of(wide)));
  transport_cost_backward[dtype_index(sides.x)](call, room.mutable_data_ptr(), on.stream);
  return {torch::stable::to(grad_x, x.scalar_type()), torch::stable::to(grad_y, y.scalar_type()),
          tensors.grad_row_marginal, tensors.grad_column_marginal, tensors.grad_column_weight};
}

}  // namespace
}  // namespace mlot::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cuda, library) {
  library.def(mlot::kTransportCostForward);
  library.def(mlot::kTransportCostBackward);
}

MLOT_CUDA_IMPLEMENTATIONS(library) {
  library.impl("transport_cost_forward", TORCH_BOX(&mlot::cuda::transport_cost_forward_of));
  library.impl("transport_cost_backward", TORCH_BOX(&mlot::cuda::transport_cost_backward_of));
}
