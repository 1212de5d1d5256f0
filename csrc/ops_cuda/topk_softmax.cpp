#include "mlot/cuda/topk_softmax.h"

#include "common.h"
#include "mlot/cuda/gradient_at_columns.h"
#include "mlot/torch/topk_softmax.h"

namespace mlot::cuda {
namespace {

TopkSoftmaxOutputs topk_softmax_forward(const Tensor& values, const Tensor& index,
                                        const std::optional<Tensor>& column_mask,
                                        const std::optional<Tensor>& log_scale, double temperature, bool standardize,
                                        int64_t vocab_size, int64_t k) {
  const OnDevice on(values);
  const LogitsArguments logits(values, index, column_mask, log_scale, temperature, standardize, vocab_size);
  const TopkSoftmaxMade made(values, index, vocab_size, k);
  const Tensor found = torch::stable::new_empty(values, {2 * made.columns.numel()}, ScalarType::Long);  // 16 bytes each
  const TopkSoftmaxForward call{.rows = logits.rows,
                                .k = k,
                                .log_probabilities = made.log_probabilities.mutable_data_ptr(),
                                .columns = static_cast<int64_t*>(made.columns.mutable_data_ptr()),
                                .lse = made.lse.mutable_data_ptr(),
                                .saved = mutable_pointers(made.saved),
                                .found = found.mutable_data_ptr()};
  topk_softmax.forward[dtype_index(values)](call, on.stream);
  return made.outputs();
}

std::tuple<Tensor, Tensor> topk_softmax_backward(const Tensor& grad_log_probabilities, const Tensor& grad_lse,
                                                 const Tensor& values, const Tensor& index,
                                                 const std::optional<Tensor>& column_mask, const Tensor& columns,
                                                 const Tensor& peak, const Tensor& log_total, const Tensor& expected,
                                                 const Tensor& mean, const Tensor& scale, const Tensor& slope,
                                                 double temperature, int64_t vocab_size) {
  const OnDevice on(values);
  const LogitsArguments logits(values, index, column_mask, std::nullopt, temperature, false, vocab_size);
  const TopkSoftmaxGiven given(grad_log_probabilities, grad_lse, values, index, columns, peak, log_total, expected,
                               mean, scale, slope);
  const Tensor slot_of = torch::stable::new_empty(values, {values.size(0), values.size(1)}, ScalarType::Int);
  const Tensor weight = torch::stable::new_empty(values, {index.numel()}, accumulator(values));
  const Tensor through = torch::stable::new_empty(values, {index.numel()}, accumulator(values));
  const GradientAtColumns call{.rows = logits.rows,
                               .temperatures = temperatures_of({temperature}),
                               .grad_log_p = given.grad_log_probabilities.const_data_ptr(),
                               .grad_mass = nullptr,
                               .grad_lse = given.grad_lse.const_data_ptr(),
                               .log_p = nullptr,
                               .columns = static_cast<const int64_t*>(given.columns.const_data_ptr()),
                               .columns_of_each_row = true,
                               .k = given.k,
                               .saved = pointers(given.saved),
                               .grad_values = given.grad_values.mutable_data_ptr(),
                               .grad_log_scale = given.grad_log_scale.mutable_data_ptr(),
                               .slot_of = static_cast<int32_t*>(slot_of.mutable_data_ptr()),
                               .weight = weight.mutable_data_ptr(),
                               .through = through.mutable_data_ptr()};
  gradient_at_columns[dtype_index(values)](call, on.stream);
  return {given.grad_values, given.grad_log_scale};
}

}  // namespace
}  // namespace mlot::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cuda, library) {
  library.def(mlot::kTopkSoftmaxForward);
  library.def(mlot::kTopkSoftmaxBackward);
}

MLOT_CUDA_IMPLEMENTATIONS(library) {
  library.impl("topk_softmax_forward", TORCH_BOX(&mlot::cuda::topk_softmax_forward));
  library.impl("topk_softmax_backward", TORCH_BOX(&mlot::cuda::topk_softmax_backward));
}
