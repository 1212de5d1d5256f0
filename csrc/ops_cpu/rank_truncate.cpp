#include "mlot/cpu/rank_truncate.h"

#include <string>
#include <tuple>
#include <vector>

#include "common.h"

namespace mlot {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

RankScope scope_of(const std::string& scope) {
  STD_TORCH_CHECK(scope == "sequence" || scope == "batch" || scope == "token",
                  "scope must be sequence, batch or token");
  return scope == "sequence" ? RankScope::sequence : scope == "batch" ? RankScope::batch : RankScope::token;
}

Tensor checked_columns(const Tensor& columns, const Tensor& index) {
  const int64_t B = index.size(0), A = index.size(1), dimensions = columns.dim();
  STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Long && (dimensions == 2 || dimensions == 3) &&
                      columns.size(0) == B && (dimensions == 2 || columns.size(1) == A),
                  "columns must be int64 [B, k] or [B, A, k]");
  return dense(columns);
}

Outputs rank_truncate_forward(const Tensor& values, const Tensor& index, const std::optional<Tensor>& column_mask,
                              const std::optional<Tensor>& log_scale, const std::optional<Tensor>& given,
                              const std::vector<double>& temperatures, bool standardize, int64_t vocab_size, int64_t k,
                              const std::string& scope) {
  const LogitsArguments logits(values, index, column_mask, log_scale, temperatures, standardize, vocab_size);
  const int64_t R = int64_t(temperatures.size()), B = index.size(0), A = index.size(1);
  STD_TORCH_CHECK(k >= 1 && (given || k <= vocab_size), "k must be in 1..vocab_size");
  STD_TORCH_CHECK(vocab_size < int64_t(1) << 32, "at most 2^32 - 1 columns");
  std::optional<Tensor> chosen;
  if (given) chosen = checked_columns(*given, index);
  STD_TORCH_CHECK(!chosen || chosen->size(chosen->dim() - 1) == k, "k must be the number of given columns");
  const bool of_each_row = chosen ? chosen->dim() == 3 : scope == "token";

  const auto fresh = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(values, shape, accumulator(values));
  };
  const Tensor log_probabilities = fresh({R, B, A, k}), kept_mass = fresh({B, A}), peak = fresh({B, A}),
               log_total = fresh({R, B, A}), expected = fresh({R, B, A}), mean = fresh({B, A}), scale = fresh({B, A}),
               slope = fresh({B, A});
  const Tensor columns = torch::stable::new_empty(
      values, of_each_row ? std::vector<int64_t>{B, A, k} : std::vector<int64_t>{B, k}, ScalarType::Long);
  const RankTruncateForward call{logits.rows,
                                 chosen ? static_cast<const int64_t*>(chosen->const_data_ptr()) : nullptr,
                                 k,
                                 chosen ? (of_each_row ? RankScope::token : RankScope::sequence) : scope_of(scope),
                                 int64_t(torch::stable::get_num_threads()),
                                 log_probabilities.mutable_data_ptr(),
                                 static_cast<int64_t*>(columns.mutable_data_ptr()),
                                 kept_mass.mutable_data_ptr(),
                                 {log_total.mutable_data_ptr(), expected.mutable_data_ptr(), peak.mutable_data_ptr(),
                                  mean.mutable_data_ptr(), scale.mutable_data_ptr(), slope.mutable_data_ptr()}};
  MLOT_SELECT(rank_truncate).forward[dtype_index(values)](call, threads());
  return {log_probabilities, columns, kept_mass, peak, log_total, expected, mean, scale, slope};
}

std::tuple<Tensor, Tensor> rank_truncate_backward(const Tensor& grad_log_probabilities, const Tensor& grad_kept_mass,
                                                  const Tensor& values, const Tensor& index,
                                                  const std::optional<Tensor>& column_mask, const Tensor& columns,
                                                  const Tensor& log_probabilities, const Tensor& peak,
                                                  const Tensor& log_total, const Tensor& expected, const Tensor& mean,
                                                  const Tensor& scale, const Tensor& slope,
                                                  const std::vector<double>& temperatures, int64_t vocab_size) {
  const LogitsArguments logits(values, index, column_mask, std::nullopt, temperatures, false, vocab_size);
  const int64_t R = int64_t(temperatures.size()), slots = index.numel();
  const Tensor chosen = checked_columns(columns, index);
  const int64_t k = chosen.size(chosen.dim() - 1);
  const auto sized = [&](const Tensor& tensor, int64_t size, const char* message) {
    STD_TORCH_CHECK(tensor.numel() == size, message);
    return dense(tensor, accumulator(values));
  };
  const auto of_rows = [&](const Tensor& tensor) { return sized(tensor, slots, "scalars of the rows must be [B, A]"); };
  const auto of_temperatures = [&](const Tensor& tensor) {
    return sized(tensor, R * slots, "log_total and expected must be [R, B, A]");
  };
  const auto of_columns = [&](const Tensor& tensor) {
    return sized(tensor, R * slots * k, "log_probabilities and their gradient must be [R, B, A, k]");
  };
  const Tensor upstream = of_columns(grad_log_probabilities), upstream_mass = of_rows(grad_kept_mass),
               kept = of_columns(log_probabilities);
  const SavedTensors saved{of_temperatures(log_total),
                           of_temperatures(expected),
                           of_rows(peak),
                           of_rows(mean),
                           of_rows(scale),
                           of_rows(slope)};
  const Tensor grad_values = torch::stable::new_empty(values, values.sizes());
  const Tensor grad_log_scale = torch::stable::new_empty(values, index.sizes(), accumulator(values));
  const RankTruncateBackward call{logits.rows,
                                  upstream.const_data_ptr(),
                                  upstream_mass.const_data_ptr(),
                                  static_cast<const int64_t*>(chosen.const_data_ptr()),
                                  chosen.dim() == 3,
                                  k,
                                  kept.const_data_ptr(),
                                  pointers(saved),
                                  prefault_hint(grad_values),
                                  grad_log_scale.mutable_data_ptr()};
  MLOT_SELECT(rank_truncate).backward[dtype_index(values)](call, threads());
  return {grad_values, grad_log_scale};
}

}  // namespace
}  // namespace mlot

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def(
      "rank_truncate_forward(Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, Tensor? given, "
      "float[] temperatures, bool standardize, int vocab_size, int k, str scope) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "rank_truncate_backward(Tensor grad_log_probabilities, Tensor grad_kept_mass, Tensor values, Tensor index, "
      "Tensor? column_mask, Tensor columns, Tensor log_probabilities, Tensor peak, Tensor log_total, Tensor expected, "
      "Tensor mean, Tensor scale, Tensor slope, float[] temperatures, int vocab_size) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("rank_truncate_forward", TORCH_BOX(&mlot::rank_truncate_forward));
  library.impl("rank_truncate_backward", TORCH_BOX(&mlot::rank_truncate_backward));
}
