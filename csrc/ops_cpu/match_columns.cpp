#include "mlot/cpu/match_columns.h"

#include "common.h"

namespace mlot {
namespace {

// Runs the kernel for one of its outputs: `columns`, or where that is not wanted the costs.
Tensor run(const Tensor& values, const Tensor& index, const std::optional<Tensor>& column_mask,
           const std::optional<Tensor>& log_scale, double temperature, bool standardize, int64_t vocab_size,
           const Tensor& teacher, bool choose) {
  const LogitsArguments logits(values, index, column_mask, log_scale, {temperature}, standardize, vocab_size);
  STD_TORCH_CHECK(teacher.dim() == 3 && teacher.size(0) == index.size(0) && teacher.size(1) == index.size(1),
                  "teacher must be [B, A, k]");
  const int64_t B = index.size(0), k = teacher.size(2);
  STD_TORCH_CHECK(k >= 1 && k <= vocab_size, "k must be in 1..vocab_size");
  const ScalarType dtype = accumulator(values, teacher);
  const Tensor log_t = dense(teacher, dtype);
  const Tensor output = choose ? torch::stable::new_empty(values, {B, k}, ScalarType::Long)
                               : torch::stable::new_empty(values, {B, k, vocab_size}, dtype);
  void* out = prefault_hint(output);
  const MatchColumns call{.rows = logits.rows,
                          .teacher = log_t.const_data_ptr(),
                          .k = k,
                          .columns = choose ? static_cast<int64_t*>(out) : nullptr,
                          .costs = choose ? nullptr : out};
  MLOT_SELECT(match_columns).run[dtype == ScalarType::Double][dtype_index(values)](call, threads());
  return output;
}

Tensor match_columns_greedy(const Tensor& values, const Tensor& index, const std::optional<Tensor>& column_mask,
                            const std::optional<Tensor>& log_scale, double temperature, bool standardize,
                            int64_t vocab_size, const Tensor& teacher) {
  return run(values, index, column_mask, log_scale, temperature, standardize, vocab_size, teacher, true);
}

Tensor match_columns_costs(const Tensor& values, const Tensor& index, const std::optional<Tensor>& column_mask,
                           const std::optional<Tensor>& log_scale, double temperature, bool standardize,
                           int64_t vocab_size, const Tensor& teacher) {
  return run(values, index, column_mask, log_scale, temperature, standardize, vocab_size, teacher, false);
}

}  // namespace
}  // namespace mlot

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def(
      "match_columns_greedy(Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, float temperature, "
      "bool standardize, int vocab_size, Tensor teacher) -> Tensor");
  library.def(
      "match_columns_costs(Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, float temperature, "
      "bool standardize, int vocab_size, Tensor teacher) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("match_columns_greedy", TORCH_BOX(&mlot::match_columns_greedy));
  library.impl("match_columns_costs", TORCH_BOX(&mlot::match_columns_costs));
}
