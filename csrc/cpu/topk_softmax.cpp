// topk_softmax on a CPU: a row's largest columns, its normaliser and its gradient. Formulas: the operator's README.
#include "mlot/cpu/topk_softmax.h"

#include <algorithm>
#include <cmath>

#include "mlot/cpu/row_statistics.h"
#include "mlot/cpu/select.h"

namespace mlot::MLOT_ISA {
namespace {

static_assert(kTile == kGroup, "the maxima of row_statistics serve select_from_maxima");

template <class A>
void write_scalars(const TopkSoftmaxScalars& scalars, int64_t slot, const RowStatistics<A>& row, A log_total,
                   A expected) {
  static_cast<A*>(scalars.peak)[slot] = row.peak;
  static_cast<A*>(scalars.log_total)[slot] = log_total;
  static_cast<A*>(scalars.expected)[slot] = expected;
  static_cast<A*>(scalars.mean)[slot] = row.mean;
  static_cast<A*>(scalars.scale)[slot] = row.scale;
  static_cast<A*>(scalars.slope)[slot] = row.slope;
}

// Owns one slot: reads its row once from memory, for the sums, whose tiles' maxima then say which few places of it the
// largest columns can be in. With a column mask, or a k that needs shorter groups, the selection reads it once more.
template <class T, class A = Accumulator<T>>
void forward_row(const LogitsView& logits, const T* x, int64_t k, const TopkSoftmaxOutputs& outputs, int64_t slot,
                 SelectScratch<A>& scratch) {
  const int64_t n = logits.vocab_size, group = group_of(n, k);
  const bool* mask = logits.column_mask;
  const TemperaturePair alone{0, -1, 1};
  ExponentialSums sums;
  A log_total, expected;
  A* maxima = !mask && group == kGroup ? scratch.maxima_of(groups_of(n, group)) : nullptr;
  const RowStatistics<A> row = row_statistics(x, n, logits.standardize, &logits.temperature, 1, &alone, 1, &sums,
                                              &log_total, &expected, 1, maxima);
  int64_t* columns = outputs.columns + slot * k;
  if (maxima) {
    select_from_maxima(x, mask, n, k, group, maxima, std::isnan(log_total), columns, scratch);
  } else {
    select_largest(x, mask, n, k, columns, scratch);
  }
  const A divisor = A(logits.temperature) * row.scale;
  const A log_scale = logits.log_scale ? static_cast<const A*>(logits.log_scale)[slot] : A(0);
  A* log_probabilities = static_cast<A*>(outputs.log_probabilities) + slot * k;
  for (int64_t i = 0; i < k; ++i) {
    const A log_q = (A(wide(x[columns[i]])) - row.peak) / divisor - log_total;
    const bool left_out = mask && !mask[columns[i]] && !std::isnan(log_q);
    log_probabilities[i] = (left_out ? A(-INFINITY) : log_q) + log_scale;
  }
  static_cast<A*>(outputs.lse)[slot] = row.peak / divisor + log_total;
  write_scalars(outputs.scalars, slot, row, log_total, expected);
}

template <class T, class A = Accumulator<T>>
void forward(const LogitsView& logits, int64_t k, const TopkSoftmaxOutputs& outputs, int64_t first, int64_t last) {
  SelectScratch<A> scratch;
  for (int64_t slot = first; slot < last; ++slot) {
    if (const T* x = row_of<T>(logits, slot)) {
      forward_row(logits, x, k, outputs, slot, scratch);
      continue;
    }
    std::fill_n(static_cast<A*>(outputs.log_probabilities) + slot * k, k, A(0));
    std::fill_n(outputs.columns + slot * k, k, int64_t(0));
    static_cast<A*>(outputs.lse)[slot] = 0;
    write_scalars(outputs.scalars, slot, RowStatistics<A>{0, 0, 0, 0}, A(0), A(0));
  }
}

// dl/dx_v = weight 2^((x_v - peak) factor) + (x_v - peak - mean) slope, before what the kept columns add.
template <class A>
struct DenseGradient {
  A peak, factor, weight, mean, slope;
};

template <bool Standardized, class A>
MLOT_INLINE Vector<A> gradient_of(Vector<A> x, const DenseGradient<A>& g) {
  const Vector<A> below = x - g.peak;
  const Vector<A> dx = exp2_negative<A>(at_least_smallest<A>(below * g.factor)) * g.weight;
  if constexpr (!Standardized) return dx;
  const auto present = VectorBits<A>(below != A(-INFINITY));
  const auto all_of_it = std::bit_cast<VectorBits<A>>(dx + (below - g.mean) * g.slope);
  return std::bit_cast<Vector<A>>(all_of_it & present);
}

template <bool Standardized, bool Finite, class T, class A = Accumulator<T>>
MLOT_INLINE void write_pair(const T* x, const DenseGradient<A>& g, T* out) {
  const Pair<A> values = load_pair(x);
  const Pair<A> dx{{gradient_of<Standardized, A>(values.part[0], g), gradient_of<Standardized, A>(values.part[1], g)}};
  if constexpr (Finite) {
    store_pair_without_nan(dx, out);
  } else {
    store_pair(dx, out);
  }
}

template <bool Standardized, bool Finite, class T, class A = Accumulator<T>>
void write_row(const T* x, int64_t n, const DenseGradient<A>& g, T* out) {
  constexpr int64_t kStep = 2 * kWidth<A>;
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) write_pair<Standardized, Finite>(x + j, g, out + j);
  if (j == n) return;
  T pad[kStep] = {};
  std::copy(x + j, x + n, pad);
  write_pair<Standardized, Finite>(pad, g, pad);
  std::copy(pad, pad + (n - j), out + j);
}

// A row whose scalars are finite has a gradient without NaN, which is quicker to round: a NaN among its logits would
// have made the normaliser, and with it the weight, NaN.
template <bool Standardized, class T, class A = Accumulator<T>>
void write_gradient(const T* x, int64_t n, const DenseGradient<A>& g, T* out) {
  if (std::isfinite(g.weight) && std::isfinite(g.slope) && std::isfinite(g.mean)) {
    write_row<Standardized, true>(x, n, g, out);
  } else {
    write_row<Standardized, false>(x, n, g, out);
  }
}

// What the k upstream gradients H of a row amount to; the sums are double.
struct UpstreamSums {
  double total = 0;   // sum of H
  double moment = 0;  // sum of H (x - peak)
  double absent = 0;  // sum of H at -inf logits, which are no part of the moment
};

// A column that is not looked at or does not exist passes nothing on.
inline bool passes(const LogitsView& logits, int64_t column) {
  return column >= 0 && column < logits.vocab_size && (!logits.column_mask || logits.column_mask[column]);
}

// Owns one slot: reads its row and writes the gradient's once, then the k kept columns of it again.
template <class T, class A = Accumulator<T>>
void backward_row(const LogitsView& logits, const T* x, int64_t k, const TopkSoftmaxGradients& gradients, int64_t slot,
                  T* out) {
  const auto at = [slot](const void* rows) { return static_cast<const A*>(rows)[slot]; };
  const TopkSoftmaxScalars& saved = gradients.scalars;
  const A peak = at(saved.peak), mean = at(saved.mean), slope = at(saved.slope), lse = at(gradients.lse);
  const A* H = static_cast<const A*>(gradients.log_probabilities) + slot * k;
  const int64_t* columns = gradients.columns + slot * k;
  UpstreamSums sums;
  for (int64_t i = 0; i < k; ++i) {
    if (!passes(logits, columns[i])) continue;
    const A below = A(wide(x[columns[i]])) - peak;
    sums.total += H[i];
    (below == A(-INFINITY) ? sums.absent : sums.moment) += below == A(-INFINITY) ? H[i] : double(H[i]) * below;
  }
  static_cast<A*>(gradients.log_scale)[slot] = A(sums.total);

  const double D = sums.total - lse, divisor = logits.temperature * at(saved.scale);
  const double W = sums.moment - D * at(saved.expected) + double(peak) * (lse - sums.absent);
  const A factor = A(kLog2E / divisor);
  const DenseGradient<A> dense{peak, factor, A(-D / divisor * std::exp(-double(at(saved.log_total)))), mean,
                               slope == 0 ? A(0) : A(-slope * W / logits.temperature)};
  const int64_t n = logits.vocab_size;
  if (dense.slope == 0) {
    write_gradient<false>(x, n, dense, out);
  } else {
    write_gradient<true>(x, n, dense, out);
  }
  for (int64_t i = 0; i < k; ++i) {
    if (!passes(logits, columns[i])) continue;
    const A below = A(wide(x[columns[i]])) - peak;
    if (below == A(-INFINITY)) continue;
    const A own = A(H[i] / divisor) + dense.weight * std::exp2(below * factor);
    narrow(own + (below - mean) * dense.slope, out[columns[i]]);
  }
}

template <class T, class A = Accumulator<T>>
void backward(const LogitsView& logits, int64_t k, const TopkSoftmaxGradients& gradients, int64_t first, int64_t last) {
  for (int64_t slot = first; slot < last; ++slot) {
    const T* x = row_of<T>(logits, slot);
    if (!x) {
      static_cast<A*>(gradients.log_scale)[slot] = 0;
      continue;
    }
    T* out = gradient_row_of<T>(logits, gradients.values, gradients.positions, gradients.width, slot);
    backward_row(logits, x, k, gradients, slot, out);
    std::fill(out + logits.vocab_size, out + gradients.width, T{});
  }
}

}  // namespace

extern const TopkSoftmaxKernels topk_softmax = {
    {forward<float>, forward<bfloat16>, forward<float16>, forward<double>},
    {backward<float>, backward<bfloat16>, backward<float16>, backward<double>}};

}  // namespace mlot::MLOT_ISA
