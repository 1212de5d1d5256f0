#include "mlot/cpu/topk_softmax.h"

#include <array>
#include <tuple>

#include "common.h"

namespace mlot {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kMostColumns = int64_t(1) << 32;  // the kernels sort columns as 32-bit integers

// k elements per row cost something beside the row's columns.
int64_t grain_of(int64_t vocab_size, int64_t k) { return grain(vocab_size + 16 * k); }

Outputs topk_softmax_forward(const Tensor& values, const Tensor& index, const std::optional<Tensor>& column_mask,
                             const std::optional<Tensor>& log_scale, double temperature, bool standardize,
                             int64_t vocab_size, int64_t k) {
  const LogitsArguments logits(values, index, column_mask, log_scale, temperature, standardize, vocab_size);
  STD_TORCH_CHECK(k >= 1 && k <= vocab_size, "k must be in 1..vocab_size");
  STD_TORCH_CHECK(vocab_size <= kMostColumns, "at most 2^32 columns");
  const int64_t B = index.size(0), A = index.size(1);
  const auto fresh = [&] { return torch::stable::new_empty(values, {B, A}, accumulator(values)); };
  const Outputs made{torch::stable::new_empty(values, {B, A, k}, accumulator(values)),
                     torch::stable::new_empty(values, {B, A, k}, ScalarType::Long),
                     fresh(), fresh(), fresh(), fresh(), fresh(), fresh(), fresh()};
  const auto at = [](const Tensor& output) { return output.mutable_data_ptr(); };
  const TopkSoftmaxOutputs outputs{at(std::get<0>(made)),
                                   static_cast<int64_t*>(at(std::get<1>(made))),
                                   at(std::get<2>(made)),
                                   {at(std::get<3>(made)), at(std::get<4>(made)), at(std::get<5>(made)),
                                    at(std::get<6>(made)), at(std::get<7>(made)), at(std::get<8>(made))}};
  const auto run = MLOT_SELECT(topk_softmax).forward[dtype_index(values)];
  torch::stable::parallel_for(0, B * A, grain_of(vocab_size, k),
                              [&](int64_t first, int64_t last) { run(logits.view, k, outputs, first, last); });
  return made;
}

std::tuple<Tensor, Tensor> topk_softmax_backward(const Tensor& grad_log_probabilities, const Tensor& grad_lse,
                                                 const Tensor& values, const Tensor& index,
                                                 const std::optional<Tensor>& column_mask, const Tensor& columns,
                                                 const Tensor& peak, const Tensor& log_total, const Tensor& expected,
                                                 const Tensor& mean, const Tensor& scale, const Tensor& slope,
                                                 double temperature, int64_t vocab_size) {
  const LogitsArguments logits(values, index, column_mask, std::nullopt, temperature, false, vocab_size);
  const int64_t slots = index.numel();
  const auto rows = [&](const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.numel() == slots, "grad_lse and what forward saved must be [B, A]");
    return dense(tensor, accumulator(values));
  };
  STD_TORCH_CHECK(columns.dim() == 3 && columns.numel() == slots * columns.size(2), "columns must be [B, A, k]");
  STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Long, "columns must be int64");
  STD_TORCH_CHECK(grad_log_probabilities.numel() == columns.numel(), "grad_log_probabilities must be [B, A, k]");
  const std::array<Tensor, 7> kept{rows(grad_lse), rows(peak),  rows(log_total), rows(expected),
                                   rows(mean),     rows(scale), rows(slope)};
  const Tensor upstream = dense(grad_log_probabilities, accumulator(values)), chosen = dense(columns);
  const Tensor grad_values = torch::stable::new_empty(values, values.sizes());
  const Tensor grad_log_scale = torch::stable::new_empty(values, index.sizes(), accumulator(values));
  const auto at = [&](int i) { return kept[i].mutable_data_ptr(); };
  const TopkSoftmaxGradients gradients{upstream.const_data_ptr(),
                                       at(0),
                                       static_cast<const int64_t*>(chosen.const_data_ptr()),
                                       {at(1), at(2), at(3), at(4), at(5), at(6)},
                                       prefault_hint(grad_values),
                                       values.size(1),
                                       values.size(2),
                                       grad_log_scale.mutable_data_ptr()};
  zero_uncounted_rows(grad_values, logits.index);
  const auto run = MLOT_SELECT(topk_softmax).backward[dtype_index(values)];
  const int64_t k = columns.size(2);
  torch::stable::parallel_for(0, slots, grain_of(vocab_size, k),
                              [&](int64_t first, int64_t last) { run(logits.view, k, gradients, first, last); });
  return {grad_values, grad_log_scale};
}

}  // namespace
}  // namespace mlot

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def(
      "topk_softmax_forward(Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, float temperature, "
      "bool standardize, int vocab_size, int k) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "topk_softmax_backward(Tensor grad_log_probabilities, Tensor grad_lse, Tensor values, Tensor index, "
      "Tensor? column_mask, Tensor columns, Tensor peak, Tensor log_total, Tensor expected, Tensor mean, Tensor scale, "
      "Tensor slope, float temperature, int vocab_size) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("topk_softmax_forward", TORCH_BOX(&mlot::topk_softmax_forward));
  library.impl("topk_softmax_backward", TORCH_BOX(&mlot::topk_softmax_backward));
}
