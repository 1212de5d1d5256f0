#include "mlot/cpu/row_entropy.h"

#include <array>
#include <tuple>

#include "common.h"

namespace mlot {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs row_entropy_forward(const Tensor& values, const Tensor& index, const std::optional<Tensor>& column_mask,
                            const std::optional<Tensor>& log_scale, double temperature, bool standardize,
                            int64_t vocab_size) {
  const LogitsArguments logits(values, index, column_mask, log_scale, temperature, standardize, vocab_size);
  const auto fresh = [&] { return torch::stable::new_empty(values, index.sizes(), accumulator(values)); };
  const Outputs made{fresh(), fresh(), fresh(), fresh(), fresh(), fresh(), fresh(), fresh()};
  const auto outputs =
      std::apply([](auto&... output) { return RowEntropyOutputs{output.mutable_data_ptr()...}; }, made);
  const auto run = MLOT_SELECT(row_entropy).forward[dtype_index(values)];
  torch::stable::parallel_for(0, index.numel(), grain(vocab_size),
                              [&](int64_t first, int64_t last) { run(logits.view, outputs, first, last); });
  return made;
}

std::tuple<Tensor, Tensor> row_entropy_backward(const Tensor& grad, const Tensor& values, const Tensor& index,
                                                const std::optional<Tensor>& column_mask,
                                                const std::optional<Tensor>& log_scale, const Tensor& entropy,
                                                const Tensor& mass, const Tensor& peak, const Tensor& log_total,
                                                const Tensor& mean, const Tensor& scale, const Tensor& slope,
                                                const Tensor& moment, double temperature, int64_t vocab_size) {
  const LogitsArguments logits(values, index, column_mask, log_scale, temperature, false, vocab_size);
  const auto rows = [&](const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.numel() == index.numel(), "grad and what forward saved must be [B, A]");
    return dense(tensor, accumulator(values));
  };
  const std::array<Tensor, 8> kept{rows(entropy), rows(mass),  rows(peak),  rows(log_total),
                                   rows(mean),    rows(scale), rows(slope), rows(moment)};
  const auto saved = std::apply([](auto&... output) { return RowEntropyOutputs{output.mutable_data_ptr()...}; }, kept);
  const Tensor grad_rows = rows(grad);
  const Tensor grad_values = torch::stable::new_empty(values, values.sizes());
  const Tensor grad_log_scale = torch::stable::new_empty(values, index.sizes(), accumulator(values));
  void* const out = prefault_hint(grad_values);
  zero_uncounted_rows(grad_values, logits.index);
  const auto run = MLOT_SELECT(row_entropy).backward[dtype_index(values)];
  torch::stable::parallel_for(0, index.numel(), grain(vocab_size), [&](int64_t first, int64_t last) {
    run(logits.view, saved, grad_rows.const_data_ptr(), out, values.size(1), values.size(2),
        grad_log_scale.mutable_data_ptr(), first, last);
  });
  return {grad_values, grad_log_scale};
}

}  // namespace
}  // namespace mlot

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def(
      "row_entropy_forward(Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, float temperature, "
      "bool standardize, int vocab_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "row_entropy_backward(Tensor grad, Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, "
      "Tensor entropy, Tensor mass, Tensor peak, Tensor log_total, Tensor mean, Tensor scale, Tensor slope, "
      "Tensor moment, float temperature, int vocab_size) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("row_entropy_forward", TORCH_BOX(&mlot::row_entropy_forward));
  library.impl("row_entropy_backward", TORCH_BOX(&mlot::row_entropy_backward));
}
