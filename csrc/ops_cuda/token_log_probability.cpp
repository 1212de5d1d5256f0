#include "mlot/cuda/token_log_probability.h"

#include <tuple>

#include "common.h"

namespace mlot::cuda {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor checked_tokens(const Tensor& tokens, const Tensor& index) {
  STD_TORCH_CHECK(tokens.scalar_type() == ScalarType::Long && tokens.numel() == index.numel(),
                  "tokens must be int64 [B, A]");
  return dense(tokens);
}

Outputs token_log_probability_forward(const Tensor& values, const Tensor& index,
                                      const std::optional<Tensor>& column_mask, const std::optional<Tensor>& log_scale,
                                      const Tensor& tokens, double temperature, bool standardize, int64_t vocab_size) {
  const OnDevice on(values);
  const LogitsArguments logits(values, index, column_mask, log_scale, temperature, standardize, vocab_size);
  const Tensor chosen = checked_tokens(tokens, index);
  const auto fresh = [&] { return torch::stable::new_empty(values, index.sizes(), accumulator(values)); };
  const Tensor log_probability = fresh(), peak = fresh(), log_total = fresh(), expected = fresh(), mean = fresh(),
               scale = fresh(), slope = fresh();
  const TokenForward call{logits.rows,
                          static_cast<const int64_t*>(chosen.const_data_ptr()),
                          log_probability.mutable_data_ptr(),
                          {log_total.mutable_data_ptr(), expected.mutable_data_ptr(), peak.mutable_data_ptr(),
                           mean.mutable_data_ptr(), scale.mutable_data_ptr(), slope.mutable_data_ptr()}};
  token_log_probability.forward[dtype_index(values)](call, on.stream);
  return {log_probability, peak, log_total, expected, mean, scale, slope};
}

std::tuple<Tensor, Tensor> token_log_probability_backward(const Tensor& grad, const Tensor& values, const Tensor& index,
                                                          const std::optional<Tensor>& column_mask,
                                                          const Tensor& tokens, const Tensor& peak,
                                                          const Tensor& log_total, const Tensor& expected,
                                                          const Tensor& mean, const Tensor& scale, const Tensor& slope,
                                                          double temperature, int64_t vocab_size) {
  const OnDevice on(values);
  const LogitsArguments logits(values, index, column_mask, std::nullopt, temperature, false, vocab_size);
  const Tensor chosen = checked_tokens(tokens, index);
  const auto rows = [&](const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.numel() == index.numel(), "grad and what forward saved must be [B, A]");
    return dense(tensor, accumulator(values));
  };
  const Tensor upstream = rows(grad);
  const SavedTensors saved{rows(log_total), rows(expected), rows(peak), rows(mean), rows(scale), rows(slope)};
  const Tensor grad_values = torch::stable::new_empty(values, values.sizes());
  const Tensor grad_log_scale = torch::stable::new_empty(values, index.sizes(), accumulator(values));
  const Tensor slot_of = torch::stable::new_empty(values, {values.size(0), values.size(1)}, ScalarType::Int);
  const TokenBackward call{logits.rows,
                           static_cast<const int64_t*>(chosen.const_data_ptr()),
                           upstream.const_data_ptr(),
                           pointers(saved),
                           grad_values.mutable_data_ptr(),
                           grad_log_scale.mutable_data_ptr(),
                           static_cast<int32_t*>(slot_of.mutable_data_ptr())};
  token_log_probability.backward[dtype_index(values)](call, on.stream);
  return {grad_values, grad_log_scale};
}

}  // namespace
}  // namespace mlot::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cuda, library) {
  library.def(
      "token_log_probability_forward(Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, "
      "Tensor tokens, float temperature, bool standardize, int vocab_size) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "token_log_probability_backward(Tensor grad, Tensor values, Tensor index, Tensor? column_mask, Tensor tokens, "
      "Tensor peak, Tensor log_total, Tensor expected, Tensor mean, Tensor scale, Tensor slope, float temperature, "
      "int vocab_size) -> (Tensor, Tensor)");
}

MLOT_CUDA_IMPLEMENTATIONS(library) {
  library.impl("token_log_probability_forward", TORCH_BOX(&mlot::cuda::token_log_probability_forward));
  library.impl("token_log_probability_backward", TORCH_BOX(&mlot::cuda::token_log_probability_backward));
}
