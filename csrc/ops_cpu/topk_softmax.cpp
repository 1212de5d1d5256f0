#include "mlot/cpu/topk_softmax.h"

#include "common.h"
#include "mlot/torch/topk_softmax.h"

namespace mlot {
namespace {

TopkSoftmaxOutputs topk_softmax_forward(const Tensor& values, const Tensor& index,
                                        const std::optional<Tensor>& column_mask,
                                        const std::optional<Tensor>& log_scale, double temperature, bool standardize,
                                        int64_t vocab_size, int64_t k) {
  const LogitsArguments logits(values, index, column_mask, log_scale, {temperature}, standardize, vocab_size);
  const TopkSoftmaxMade made(values, index, vocab_size, k);
  const TopkSoftmaxForward call{.rows = logits.rows,
                                .k = k,
                                .log_probabilities = made.log_probabilities.mutable_data_ptr(),
                                .columns = static_cast<int64_t*>(made.columns.mutable_data_ptr()),
                                .lse = made.lse.mutable_data_ptr(),
                                .saved = mutable_pointers(made.saved)};
  MLOT_SELECT(topk_softmax).forward[dtype_index(values)](call, threads());
  return made.outputs();
}

std::tuple<Tensor, Tensor> topk_softmax_backward(const Tensor& grad_log_probabilities, const Tensor& grad_lse,
                                                 const Tensor& values, const Tensor& index,
                                                 const std::optional<Tensor>& column_mask, const Tensor& columns,
                                                 const Tensor& peak, const Tensor& log_total, const Tensor& expected,
                                                 const Tensor& mean, const Tensor& scale, const Tensor& slope,
                                                 double temperature, int64_t vocab_size) {
  const LogitsArguments logits(values, index, column_mask, std::nullopt, {temperature}, false, vocab_size);
  const TopkSoftmaxGiven given(grad_log_probabilities, grad_lse, values, index, columns, peak, log_total, expected,
                               mean, scale, slope);
  const TopkSoftmaxBackward call{
      .rows = logits.rows,
      .k = given.k,
      .grad_log_probabilities = given.grad_log_probabilities.const_data_ptr(),
      .grad_lse = given.grad_lse.const_data_ptr(),
      .columns = static_cast<const int64_t*>(given.columns.const_data_ptr()),
      .saved = pointers(given.saved),
      .grad_values = prefault_hint(given.grad_values),
      .grad_log_scale = given.grad_log_scale.mutable_data_ptr(),
  };
  MLOT_SELECT(topk_softmax).backward[dtype_index(values)](call, threads());
  return {given.grad_values, given.grad_log_scale};
}

}  // namespace
}  // namespace mlot

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def(mlot::kTopkSoftmaxForward);
  library.def(mlot::kTopkSoftmaxBackward);
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("topk_softmax_forward", TORCH_BOX(&mlot::topk_softmax_forward));
  library.impl("topk_softmax_backward", TORCH_BOX(&mlot::topk_softmax_backward));
}
