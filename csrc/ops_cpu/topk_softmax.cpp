#include "mlot/cpu/topk_softmax.h"

#include <tuple>

#include "common.h"

namespace mlot {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kMostColumns = int64_t(1) << 32;  // the kernels sort columns as 32-bit integers

Outputs topk_softmax_forward(const Tensor& values, const Tensor& index, const std::optional<Tensor>& column_mask,
                             const std::optional<Tensor>& log_scale, double temperature, bool standardize,
                             int64_t vocab_size, int64_t k) {
  const LogitsArguments logits(values, index, column_mask, log_scale, {temperature}, standardize, vocab_size);
  STD_TORCH_CHECK(k >= 1 && k <= vocab_size, "k must be in 1..vocab_size");
  STD_TORCH_CHECK(vocab_size <= kMostColumns, "at most 2^32 columns");
  const int64_t B = index.size(0), A = index.size(1);
  const auto fresh = [&] { return torch::stable::new_empty(values, {B, A}, accumulator(values)); };
  const Tensor log_probabilities = torch::stable::new_empty(values, {B, A, k}, accumulator(values)),
               columns = torch::stable::new_empty(values, {B, A, k}, ScalarType::Long), lse = fresh(), peak = fresh(),
               log_total = fresh(), expected = fresh(), mean = fresh(), scale = fresh(), slope = fresh();
  const TopkSoftmaxForward call{logits.rows,
                                k,
                                log_probabilities.mutable_data_ptr(),
                                static_cast<int64_t*>(columns.mutable_data_ptr()),
                                lse.mutable_data_ptr(),
                                {log_total.mutable_data_ptr(), expected.mutable_data_ptr(), peak.mutable_data_ptr(),
                                 mean.mutable_data_ptr(), scale.mutable_data_ptr(), slope.mutable_data_ptr()}};
  MLOT_SELECT(topk_softmax).forward[dtype_index(values)](call, threads());
  return {log_probabilities, columns, lse, peak, log_total, expected, mean, scale, slope};
}

std::tuple<Tensor, Tensor> topk_softmax_backward(const Tensor& grad_log_probabilities, const Tensor& grad_lse,
                                                 const Tensor& values, const Tensor& index,
                                                 const std::optional<Tensor>& column_mask, const Tensor& columns,
                                                 const Tensor& peak, const Tensor& log_total, const Tensor& expected,
                                                 const Tensor& mean, const Tensor& scale, const Tensor& slope,
                                                 double temperature, int64_t vocab_size) {
  const LogitsArguments logits(values, index, column_mask, std::nullopt, {temperature}, false, vocab_size);
  const int64_t slots = index.numel();
  const auto rows = [&](const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.numel() == slots, "grad_lse and what forward saved must be [B, A]");
    return dense(tensor, accumulator(values));
  };
  STD_TORCH_CHECK(columns.dim() == 3 && columns.numel() == slots * columns.size(2), "columns must be [B, A, k]");
  STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Long, "columns must be int64");
  STD_TORCH_CHECK(grad_log_probabilities.numel() == columns.numel(), "grad_log_probabilities must be [B, A, k]");
  const Tensor upstream = dense(grad_log_probabilities, accumulator(values)), upstream_lse = rows(grad_lse),
               chosen = dense(columns);
  const SavedTensors saved{rows(log_total), rows(expected), rows(peak), rows(mean), rows(scale), rows(slope)};
  const Tensor grad_values = torch::stable::new_empty(values, values.sizes());
  const Tensor grad_log_scale = torch::stable::new_empty(values, index.sizes(), accumulator(values));
  const TopkSoftmaxBackward call{logits.rows,
                                 columns.size(2),
                                 upstream.const_data_ptr(),
                                 upstream_lse.const_data_ptr(),
                                 static_cast<const int64_t*>(chosen.const_data_ptr()),
                                 pointers(saved),
                                 prefault_hint(grad_values),
                                 grad_log_scale.mutable_data_ptr()};
  MLOT_SELECT(topk_softmax).backward[dtype_index(values)](call, threads());
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
