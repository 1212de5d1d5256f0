#include "mlot/cuda/row_entropy.h"

#include <tuple>

#include "common.h"

namespace mlot::cuda {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs row_entropy_forward(const Tensor& values, const Tensor& index, const std::optional<Tensor>& column_mask,
                            const std::optional<Tensor>& log_scale, double temperature, bool standardize,
                            int64_t vocab_size) {
  const OnDevice on(values);
  const LogitsArguments logits(values, index, column_mask, log_scale, temperature, standardize, vocab_size);
  const auto fresh = [&] { return torch::stable::new_empty(values, index.sizes(), accumulator(values)); };
  const Outputs made{fresh(), fresh(), fresh(), fresh(), fresh(), fresh(), fresh(), fresh()};
  const RowEntropyForward call{
      logits.rows,
      std::apply([](auto&... output) { return RowEntropyScalars<void*>{output.mutable_data_ptr()...}; }, made)};
  row_entropy.forward[dtype_index(values)](call, on.stream);
  return made;
}

std::tuple<Tensor, Tensor> row_entropy_backward(const Tensor& grad, const Tensor& values, const Tensor& index,
                                                const std::optional<Tensor>& column_mask,
                                                const std::optional<Tensor>& log_scale, const Tensor& entropy,
                                                const Tensor& mass, const Tensor& peak, const Tensor& log_total,
                                                const Tensor& mean, const Tensor& scale, const Tensor& slope,
                                                const Tensor& moment, double temperature, int64_t vocab_size) {
  const OnDevice on(values);
  const LogitsArguments logits(values, index, column_mask, log_scale, temperature, false, vocab_size);
  const auto rows = [&](const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.numel() == index.numel(), "grad and what forward saved must be [B, A]");
    return dense(tensor, accumulator(values));
  };
  const Outputs saved{rows(entropy), rows(mass),  rows(peak),  rows(log_total),
                      rows(mean),    rows(scale), rows(slope), rows(moment)};
  const Tensor grad_rows = rows(grad);
  const Tensor grad_values = torch::stable::new_empty(values, values.sizes());
  const Tensor grad_log_scale = torch::stable::new_empty(values, index.sizes(), accumulator(values));
  const Tensor slot_of = torch::stable::new_empty(values, {values.size(0), values.size(1)}, ScalarType::Int);
  const RowEntropyBackward call{
      logits.rows,
      grad_rows.const_data_ptr(),
      std::apply([](auto&... scalars) { return RowEntropyScalars<const void*>{scalars.const_data_ptr()...}; }, saved),
      grad_values.mutable_data_ptr(),
      grad_log_scale.mutable_data_ptr(),
      static_cast<int32_t*>(slot_of.mutable_data_ptr())};
  row_entropy.backward[dtype_index(values)](call, on.stream);
  return {grad_values, grad_log_scale};
}

}  // namespace
}  // namespace mlot::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cuda, library) {
  library.def(
      "row_entropy_forward(Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, float temperature, "
      "bool standardize, int vocab_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "row_entropy_backward(Tensor grad, Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, "
      "Tensor entropy, Tensor mass, Tensor peak, Tensor log_total, Tensor mean, Tensor scale, Tensor slope, "
      "Tensor moment, float temperature, int vocab_size) -> (Tensor, Tensor)");
}

MLOT_CUDA_IMPLEMENTATIONS(library) {
  library.impl("row_entropy_forward", TORCH_BOX(&mlot::cuda::row_entropy_forward));
  library.impl("row_entropy_backward", TORCH_BOX(&mlot::cuda::row_entropy_backward));
}
