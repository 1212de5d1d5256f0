// topk_softmax on a CPU; compiled once per instruction set.
#include "mlot/cpu/topk_softmax.h"

#include <algorithm>
#include <cmath>

#include "mlot/cpu/row_gradient.h"
#include "mlot/cpu/row_statistics.h"
#include "mlot/cpu/select.h"

namespace mlot::MLOT_ISA {
namespace {

static_assert(kTile == kGroup, "the maxima of row_statistics serve select_from_maxima");

// k elements per row cost something beside the row's columns.
int64_t rows_worth_a_thread(const LogitsRows& rows, int64_t k) { return worth_a_thread(rows.vocab_size + 16 * k); }

// Owns one slot: reads its row once from memory, for the sums, whose tiles' maxima then say which few places of it the
// largest columns can be in. With a column mask, or a k that needs shorter groups, the selection reads it once more.
template <class T, class A = Accumulator<T>>
void forward_row(const TopkSoftmaxForward& call, const T* x, int64_t slot, SelectScratch<A>& scratch) {
  const auto at = [slot](void* scalars) -> A& { return static_cast<A*>(scalars)[slot]; };
  const LogitsRows& rows = call.rows;
  const int64_t n = rows.vocab_size, k = call.k, group = group_of(n, k);
  const TemperaturePair alone{0, -1, 1};
  ExponentialSums sums;
  A* maxima = !rows.column_mask && group == kGroup ? scratch.maxima_of(groups_of(n, group)) : nullptr;
  A& log_total = at(call.saved.log_total);
  const RowStatistics<A> row = row_statistics(x, n, rows.standardize, rows.temperatures, 1, &alone, 1, &sums,
                                              &log_total, &at(call.saved.expected), 1, maxima);
  at(call.saved.peak) = row.peak, at(call.saved.mean) = row.mean;
  at(call.saved.scale) = row.scale, at(call.saved.slope) = row.slope;

  int64_t* columns = call.columns + slot * k;
  if (maxima) {
    select_from_maxima(x, rows.column_mask, n, k, group, maxima, std::isnan(log_total), columns, scratch);
  } else {
    select_largest(x, rows.column_mask, n, k, columns, scratch);
  }
  const A scaled = A(rows.temperatures[0]) * row.scale;
  const A log_scale = rows.log_scale ? static_cast<const A*>(rows.log_scale)[slot] : A(0);
  A* log_probabilities = static_cast<A*>(call.log_probabilities) + slot * k;
  for (int64_t i = 0; i < k; ++i) {
    log_probabilities[i] = log_probability<T>(rows, x, columns[i], row.peak, scaled, log_total, log_scale);
  }
  at(call.lse) = row.peak / scaled + log_total;
}

template <class T, class A = Accumulator<T>>
void forward(const TopkSoftmaxForward& call, const Parallel& parallel) {
  const LogitsRows& rows = call.rows;
  parallel(rows.all_slots(), rows_worth_a_thread(rows, call.k), [&](int64_t first, int64_t last) {
    SelectScratch<A> scratch;
    for (int64_t slot = first; slot < last; ++slot) {
      if (const T* x = row_of<T>(rows, slot)) {
        forward_row(call, x, slot, scratch);
        continue;
      }
      std::fill_n(static_cast<A*>(call.log_probabilities) + slot * call.k, call.k, A(0));
      std::fill_n(call.columns + slot * call.k, call.k, int64_t(0));
      const auto& [log_total, expected, peak, mean, scale, slope] = call.saved;
      for (void* scalars : {call.lse, log_total, expected, peak, mean, scale, slope}) {
        static_cast<A*>(scalars)[slot] = 0;
      }
    }
  });
}

template <class T, class A = Accumulator<T>>
void backward(const TopkSoftmaxBackward& call, const Parallel& parallel) {
  gradient_of_rows<T>(call.rows, call.saved, call.grad_values, call.grad_log_scale, parallel, [&](int64_t slot) {
    return GradientOfRow<A>{
        .log_p = static_cast<const A*>(call.grad_log_probabilities) + slot * call.k,
        .log_p_stride = 0,
        .kept = nullptr,
        .mass = 0,
        .lse = static_cast<const A*>(call.grad_lse)[slot],
        .columns = call.columns + slot * call.k,
        .k = call.k,
    };
  });
}

}  // namespace

extern const TopkSoftmax topk_softmax = {{forward<float>, forward<bfloat16>, forward<float16>, forward<double>},
                                         {backward<float>, backward<bfloat16>, backward<float16>, backward<double>}};

}  // namespace mlot::MLOT_ISA
