// token_log_probability on a CPU; compiled once per instruction set.
#include "mlot/cpu/token_log_probability.h"

#include "mlot/cpu/row_gradient.h"
#include "mlot/cpu/row_statistics.h"

namespace mlot::MLOT_ISA {
namespace {

template <class T>
void forward(const TokenForward& call, const Parallel& parallel) {
  using A = Accumulator<T>;
  const LogitsRows& rows = call.rows;
  const auto at = [](void* scalars, int64_t slot) -> A& { return static_cast<A*>(scalars)[slot]; };
  parallel(rows.all_slots(), worth_a_thread(rows.vocab_size), [&](int64_t first, int64_t last) {
    ExponentialSums sums;
    const TemperaturePair alone{0, -1, 1};
    for (int64_t slot = first; slot < last; ++slot) {
      const T* x = row_of<T>(rows, slot);
      RowStatistics<A> row{};
      A &log_total = at(call.saved.log_total, slot), &log_p = at(call.log_probability, slot);
      log_p = log_total = at(call.saved.expected, slot) = 0;
      if (x) {
        row = row_statistics<T, A>(x, rows.vocab_size, rows.standardize, rows.temperatures, 1, &alone, 1, &sums,
                                   &log_total, &at(call.saved.expected, slot), 1, nullptr);
        const A log_scale = rows.log_scale ? static_cast<const A*>(rows.log_scale)[slot] : A(0);
        log_p = log_probability<T>(rows, x, call.tokens[slot], row.peak, A(rows.temperatures[0]) * row.scale, log_total,
                                   log_scale);
      }
      at(call.saved.peak, slot) = row.peak, at(call.saved.mean, slot) = row.mean;
      at(call.saved.scale, slot) = row.scale, at(call.saved.slope, slot) = row.slope;
    }
  });
}

template <class T>
void backward(const TokenBackward& call, const Parallel& parallel) {
  using A = Accumulator<T>;
  gradient_of_rows<T>(call.rows, call.saved, call.grad_values, call.grad_log_scale, parallel, [&](int64_t slot) {
    return GradientOfRow<A>{.log_p = static_cast<const A*>(call.grad) + slot,
                            .log_p_stride = 0,
                            .kept = nullptr,
                            .mass = 0,
                            .lse = 0,
                            .columns = call.tokens + slot,
                            .k = 1};
  });
}

}  // namespace

extern const TokenLogProbability token_log_probability = {
    {forward<float>, forward<bfloat16>, forward<float16>, forward<double>},
    {backward<float>, backward<bfloat16>, backward<float16>, backward<double>}};

}  // namespace mlot::MLOT_ISA
