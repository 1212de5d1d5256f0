#include "mlot/cpu/sinkhorn.h"

#include <tuple>

#include "transport.h"

namespace mlot {
namespace {

SinkhornOutputs sinkhorn_forward(const Tensor& cost, const std::optional<Tensor>& row_marginal,
                                 const std::optional<Tensor>& column_marginal, const std::optional<Tensor>& row_lengths,
                                 const std::optional<Tensor>& column_lengths,
                                 const std::optional<Tensor>& column_weight, double epsilon, int64_t iterations,
                                 const std::string& marginals, double tolerance, const std::string& domain,
                                 const std::string& gradient, bool return_plan) {
  STD_TORCH_CHECK(cost.dim() == 3, "cost must be [B, M, N]");
  const ScalarType wide = accumulator(cost);
  const int64_t B = cost.size(0), M = cost.size(1), N = cost.size(2);
  const TransportArguments arguments(B, M, N, wide, row_marginal, column_marginal, row_lengths, column_lengths,
                                     column_weight, epsilon, iterations, marginals, tolerance, domain, gradient);
  const TransportTensors outputs(cost, wide, arguments.options);
  const Tensor plan =
      torch::stable::new_empty(cost, return_plan ? std::vector<int64_t>{B, M, N} : std::vector<int64_t>{0}, wide);
  const SinkhornForward call{matrices(cost), arguments.options, return_plan ? prefault_hint(plan) : nullptr,
                             outputs.pointers(arguments.options)};
  MLOT_SELECT(sinkhorn).forward[dtype_index(cost)](call, threads());
  return {outputs.transported,   outputs.regularized,      plan,
          outputs.row_potential, outputs.column_potential, outputs.done,
          outputs.row_history,   outputs.column_history};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sinkhorn_backward(
    const Tensor& grad_transported, const Tensor& grad_regularized, const Tensor& grad_plan, const Tensor& cost,
    const std::optional<Tensor>& row_marginal, const std::optional<Tensor>& column_marginal,
    const std::optional<Tensor>& row_lengths, const std::optional<Tensor>& column_lengths,
    const std::optional<Tensor>& column_weight, const Tensor& row_potential, const Tensor& column_potential,
    const Tensor& done, const Tensor& row_history, const Tensor& column_history, double epsilon, int64_t iterations,
    const std::string& marginals, double tolerance, const std::string& domain, const std::string& gradient,
    bool return_plan) {
  STD_TORCH_CHECK(cost.dim() == 3, "cost must be [B, M, N]");
  const ScalarType wide = accumulator(cost);
  const int64_t B = cost.size(0), M = cost.size(1), N = cost.size(2);
  const TransportArguments arguments(B, M, N, wide, row_marginal, column_marginal, row_lengths, column_lengths,
                                     column_weight, epsilon, iterations, marginals, tolerance, domain, gradient);
  const TransportBackwardTensors tensors(arguments.options, wide, grad_transported, grad_regularized, row_potential,
                                         column_potential, done, row_history, column_history);
  check_steps(tensors.done, arguments.options);
  STD_TORCH_CHECK(!return_plan || grad_plan.numel() == B * M * N, "grad_plan must be [B, M, N]");
  const Tensor upstream_plan = dense(grad_plan, wide);
  const Tensor grad_cost = torch::stable::new_empty(cost, cost.sizes(), wide);
  const SinkhornBackward call{tensors.upstream(), return_plan ? upstream_plan.const_data_ptr() : nullptr,
                              matrices(cost),     arguments.options,
                              tensors.saved(),    prefault_hint(grad_cost),
                              tensors.gradients()};
  MLOT_SELECT(sinkhorn).backward[dtype_index(cost)](call, threads());
  return {grad_cost, tensors.grad_row_marginal, tensors.grad_column_marginal, tensors.grad_column_weight};
}

}  // namespace
}  // namespace mlot

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def(mlot::kSinkhornForward);
  library.def(mlot::kSinkhornBackward);
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("sinkhorn_forward", TORCH_BOX(&mlot::sinkhorn_forward));
  library.impl("sinkhorn_backward", TORCH_BOX(&mlot::sinkhorn_backward));
}
