#include "mlot/cpu/rank_truncate.h"

#include "common.h"
#include "mlot/torch/rank_truncate.h"

namespace mlot {
namespace {

RankTruncateOutputs rank_truncate_forward(const Tensor& values, const Tensor& index,
                                          const std::optional<Tensor>& column_mask,
                                          const std::optional<Tensor>& log_scale, const std::optional<Tensor>& given,
                                          const std::vector<double>& temperatures, bool standardize, int64_t vocab_size,
                                          int64_t k, const std::string& scope) {
  const LogitsArguments logits(values, index, column_mask, log_scale, temperatures, standardize, vocab_size);
  const RankTruncateMade made(values, index, given, int64_t(temperatures.size()), vocab_size, k, scope);
  const RankTruncateForward call{logits.rows,
                                 made.given ? static_cast<const int64_t*>(made.given->const_data_ptr()) : nullptr,
                                 k,
                                 made.scope,
                                 int64_t(torch::stable::get_num_threads()),
                                 made.log_probabilities.mutable_data_ptr(),
                                 static_cast<int64_t*>(made.columns.mutable_data_ptr()),
                                 made.kept_mass.mutable_data_ptr(),
                                 mutable_pointers(made.saved)};
  MLOT_SELECT(rank_truncate).forward[dtype_index(values)](call, threads());
  return made.outputs();
}

std::tuple<Tensor, Tensor> rank_truncate_backward(const Tensor& grad_log_probabilities, const Tensor& grad_kept_mass,
                                                  const Tensor& values, const Tensor& index,
                                                  const std::optional<Tensor>& column_mask, const Tensor& columns,
                                                  const Tensor& log_probabilities, const Tensor& peak,
                                                  const Tensor& log_total, const Tensor& expected, const Tensor& mean,
                                                  const Tensor& scale, const Tensor& slope,
                                                  const std::vector<double>& temperatures, int64_t vocab_size) {
  const LogitsArguments logits(values, index, column_mask, std::nullopt, temperatures, false, vocab_size);
  const RankTruncateGiven given(grad_log_probabilities, grad_kept_mass, values, index, columns, log_probabilities, peak,
                                log_total, expected, mean, scale, slope, int64_t(temperatures.size()));
  const RankTruncateBackward call{logits.rows,
                                  given.grad_log_probabilities.const_data_ptr(),
                                  given.grad_kept_mass.const_data_ptr(),
                                  static_cast<const int64_t*>(given.columns.const_data_ptr()),
                                  given.columns.dim() == 3,
                                  given.k,
                                  given.log_probabilities.const_data_ptr(),
                                  pointers(given.saved),
                                  prefault_hint(given.grad_values),
                                  given.grad_log_scale.mutable_data_ptr()};
  MLOT_SELECT(rank_truncate).backward[dtype_index(values)](call, threads());
  return {given.grad_values, given.grad_log_scale};
}

}  // namespace
}  // namespace mlot

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def(mlot::kRankTruncateForward);
  library.def(mlot::kRankTruncateBackward);
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("rank_truncate_forward", TORCH_BOX(&mlot::rank_truncate_forward));
  library.impl("rank_truncate_backward", TORCH_BOX(&mlot::rank_truncate_backward));
}
