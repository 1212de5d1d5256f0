#include "mlot/cuda/rank_truncate.h"

#include "common.h"
#include "mlot/torch/rank_truncate.h"

namespace mlot::cuda {
namespace {

Temperatures checked_temperatures(const std::vector<double>& temperatures) {
  STD_TORCH_CHECK(!temperatures.empty() && temperatures.size() <= size_t(kMostTemperatures),
                  "temperatures must be 1 to 16");
  return temperatures_of(temperatures);
}

RankTruncateOutputs rank_truncate_forward(const Tensor& values, const Tensor& index,
                                          const std::optional<Tensor>& column_mask,
                                          const std::optional<Tensor>& log_scale, const std::optional<Tensor>& given,
                                          const std::vector<double>& temperatures, bool standardize, int64_t vocab_size,
                                          int64_t k, const std::string& scope) {
  const OnDevice on(values);
  const Temperatures checked = checked_temperatures(temperatures);
  const LogitsArguments logits(values, index, column_mask, log_scale, temperatures[0], standardize, vocab_size);
  RankTruncateMade made(values, index, given, checked.count, vocab_size, k, scope);
  const bool ranks = !given, together = ranks && made.scope != RankScope::token;
  if (!ranks) torch::stable::copy_(made.columns, *made.given);
  const int64_t B = index.size(0), rankings = made.scope == RankScope::batch && B > 0 ? 1 : B;
  const int64_t width = padded(vocab_size), slots = index.numel();
  const Tensor sums =
      torch::stable::new_empty(values, {together ? B * parts_of(index.size(1)) * width : 0}, accumulator(values));
  const Tensor found = torch::stable::new_empty(values, {ranks ? 2 * k * (together ? rankings : slots) : 0},
                                                ScalarType::Long);  // 16 bytes each
  const RankTruncateForward call{.sums = {.rows = logits.rows,
                                          .temperatures = checked,
                                          .saved = mutable_pointers(made.saved),
                                          .sums = sums.mutable_data_ptr(),
                                          .width = width,
                                          .rankings = rankings},
                                 .ranks = ranks,
                                 .scope = made.scope,
                                 .columns_of_each_row = made.columns_of_each_row,
                                 .k = k,
                                 .log_probabilities = made.log_probabilities.mutable_data_ptr(),
                                 .columns = static_cast<int64_t*>(made.columns.mutable_data_ptr()),
                                 .kept_mass = made.kept_mass.mutable_data_ptr(),
                                 .found = found.mutable_data_ptr()};
  rank_truncate.forward[dtype_index(values)](call, on.stream);
  return made.outputs();
}

std::tuple<Tensor, Tensor> rank_truncate_backward(const Tensor& grad_log_probabilities, const Tensor& grad_kept_mass,
                                                  const Tensor& values, const Tensor& index,
                                                  const std::optional<Tensor>& column_mask, const Tensor& columns,
                                                  const Tensor& log_probabilities, const Tensor& peak,
                                                  const Tensor& log_total, const Tensor& expected, const Tensor& mean,
                                                  const Tensor& scale, const Tensor& slope,
                                                  const std::vector<double>& temperatures, int64_t vocab_size) {
  const OnDevice on(values);
  const Temperatures checked = checked_temperatures(temperatures);
  const LogitsArguments logits(values, index, column_mask, std::nullopt, temperatures[0], false, vocab_size);
  const RankTruncateGiven given(grad_log_probabilities, grad_kept_mass, values, index, columns, log_probabilities, peak,
                                log_total, expected, mean, scale, slope, checked.count);
  const int64_t R = checked.count, slots = index.numel();
  const Tensor slot_of = torch::stable::new_empty(values, {values.size(0), values.size(1)}, ScalarType::Int);
  const Tensor weight = torch::stable::new_empty(values, {R, slots}, accumulator(values));
  const Tensor through = torch::stable::new_empty(values, {slots}, accumulator(values));
  const GradientAtColumns call{.rows = logits.rows,
                               .temperatures = checked,
                               .grad_log_p = given.grad_log_probabilities.const_data_ptr(),
                               .grad_mass = given.grad_kept_mass.const_data_ptr(),
                               .grad_lse = nullptr,
                               .log_p = given.log_probabilities.const_data_ptr(),
                               .columns = static_cast<const int64_t*>(given.columns.const_data_ptr()),
                               .columns_of_each_row = given.columns.dim() == 3,
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
  library.def(mlot::kRankTruncateForward);
  library.def(mlot::kRankTruncateBackward);
}

MLOT_CUDA_IMPLEMENTATIONS(library) {
  library.impl("rank_truncate_forward", TORCH_BOX(&mlot::cuda::rank_truncate_forward));
  library.impl("rank_truncate_backward", TORCH_BOX(&mlot::cuda::rank_truncate_backward));
}
