// The gradient of log-probabilities at a few columns of each row, for all temperatures in one read of the row and one
// write of the gradient; mlot_kernels/logits.py has the formulas (`gradient_at_columns`).
#pragma once

#include <algorithm>
#include <vector>

#include "mlot/cpu/logits.h"
#include "mlot/cpu/row_statistics.h"

namespace mlot::MLOT_ISA {

// Columns after which the kept ones among them are corrected: their gradient is still in the L1 cache.
constexpr int64_t kGradientChunk = 1024;

// Writes all of a gradient [B, T, width]. `row(slot, out)` writes the columns of a counted row's distribution; columns
// behind them and rows that do not count become zeros. Every thread gets its share of either kind of row.
template <class T, class Row>
static inline void write_rows(const LogitsRows& rows, void* grad_values, const Parallel& parallel, const Row& row) {
  std::vector<int64_t> counted, rest;  // slots; places in [B, T]
  std::vector<char> is_counted(rows.sequences * rows.positions);
  const auto place = [&](int64_t slot) { return slot / rows.slots * rows.positions + rows.index[slot]; };
  for (int64_t slot = 0; slot < rows.all_slots(); ++slot) {
    if (rows.index[slot] >= 0) counted.push_back(slot), is_counted[place(slot)] = 1;
  }
  for (int64_t i = 0; i < int64_t(is_counted.size()); ++i) {
    if (!is_counted[i]) rest.push_back(i);
  }
  T* const begin = static_cast<T*>(grad_values);
  const int64_t n = int64_t(std::max(counted.size(), rest.size()));
  parallel(n, worth_a_thread(rows.width), [&](int64_t first, int64_t last) {
    const auto share = [&](const std::vector<int64_t>& of, int64_t end) { return end * int64_t(of.size()) / n; };
    for (int64_t i = share(counted, first); i < share(counted, last); ++i) {
      T* out = begin + place(counted[i]) * rows.width;
      row(counted[i], out);
      std::fill(out + rows.vocab_size, out + rows.width, T{});
    }
    for (int64_t i = share(rest, first); i < share(rest, last); ++i) {
      std::fill_n(begin + rest[i] * rows.width, rows.width, T{});
    }
  });
}

// Whether a row of gradient has one temperature, two of which the second's 2^t is the square of the first's, or others.
enum class Temperatures { one, squared, several };

// What every column's gradient is made of, beside what the kept ones get: with below = x - peak, it is the sum of
// 2^(below factor_r) weight_r over the temperatures r, and (below - center) slope. At -inf it is 0.
template <class A>
struct DenseGradient {
  A peak, center, slope;
  const A *factor, *weight;
  int64_t count;
};

// Plain: slope is 0 and all weights are finite, so that nothing more is to do for -inf.
template <Temperatures Kind, bool Plain, class T, class A = Accumulator<T>>
MLOT_INLINE void write_pair(const T* x, const DenseGradient<A>& dense, T* out) {
  const Pair<A> v = load_pair(x);
  Pair<A> g;
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const Vector<A> below = v.part[h] - dense.peak;
    Vector<A> sum = {};
    if constexpr (!Plain) sum = (below - dense.center) * dense.slope;
    if constexpr (Kind == Temperatures::several) {
      for (int64_t r = 0; r < dense.count; ++r) {
        sum += exp2_negative<A>(at_least_smallest<A>(below * dense.factor[r])) * dense.weight[r];
      }
    } else {
      const Vector<A> e = exp2_negative<A>(at_least_smallest<A>(below * dense.factor[0]));
      if constexpr (Kind == Temperatures::one) sum += e * dense.weight[0];
      if constexpr (Kind == Temperatures::squared) sum += e * (dense.weight[0] + e * dense.weight[1]);
    }
    const auto present = VectorBits<A>(below != A(-INFINITY));
    g.part[h] = Plain ? sum : std::bit_cast<Vector<A>>(std::bit_cast<VectorBits<A>>(sum) & present);
  }
  if constexpr (Plain) {
    store_pair_without_nan(g, out);
  } else {
    store_pair(g, out);
  }
}

template <Temperatures Kind, bool Plain, class T, class A = Accumulator<T>>
static inline void gradient_chunk(const T* x, int64_t n, const DenseGradient<A>& given, T* out) {
  constexpr int64_t kStep = 2 * kWidth<A>;
  const DenseGradient<A> dense = given;  // a copy, which `out` cannot change
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) write_pair<Kind, Plain>(x + j, dense, out + j);
  if (j == n) return;
  T pad[kStep] = {};
  std::copy(x + j, x + n, pad);
  write_pair<Kind, Plain>(pad, dense, pad);
  std::copy(pad, pad + (n - j), out + j);
}

template <class T>
static inline auto gradient_chunk_of(Temperatures kind, bool plain) {
  using enum Temperatures;
  if (kind == one) return plain ? gradient_chunk<one, true, T> : gradient_chunk<one, false, T>;
  if (kind == squared) return plain ? gradient_chunk<squared, true, T> : gradient_chunk<squared, false, T>;
  return plain ? gradient_chunk<several, true, T> : gradient_chunk<several, false, T>;
}

// What one row's gradient is made from.
template <class A>
struct GradientOfRow {
  const A* log_p;  // dl/dlog p of the k columns: log_p[r * log_p_stride + i]
  int64_t log_p_stride;
  const A* kept;           // log p of the k columns at the first temperature, or null
  A mass;                  // dl/d of the sum of their exp
  A lse;                   // dl/d of the log of the sum of exp at the first temperature
  const int64_t* columns;  // [k]; they may repeat
  int64_t k;
};

// The scalars that forward saved of one row; those of temperature r at [r * stride].
template <class A>
struct ScalarsOfRow {
  const A *log_total, *expected;
  int64_t stride;
  A peak, mean, scale, slope;
};

template <class A>
struct KeptColumn {
  int64_t column, slot;
  A gradient;  // what dl/dx gets there beside the dense part
};

// Reads the row `x` once and writes the gradient of the distribution's columns to `out`. Given columns that do not
// exist or are not looked at pass nothing on. Returns the gradient of the row's log scale.
template <class T, class A = Accumulator<T>>
static inline A row_gradient(const LogitsRows& rows, const T* x, const ScalarsOfRow<A>& saved,
                             const GradientOfRow<A>& gradient, T* out) {
  const int64_t R = rows.temperature_count;
  std::vector<KeptColumn<A>> kept;
  kept.reserve(gradient.k);
  for (int64_t i = 0; i < gradient.k; ++i) {
    const int64_t column = gradient.columns[i];
    if (column < 0 || column >= rows.vocab_size || (rows.column_mask && !rows.column_mask[column])) continue;
    kept.push_back({column, i, A(0)});
  }
  std::vector<A> factors(R), weights(R);  // of each temperature: 2^(below factor) weight is its part of dl/dx
  double all_temperatures = 0, through_deviation = 0;
  for (int64_t r = 0; r < R; ++r) {
    const double scaled = rows.temperatures[r] * double(saved.scale);
    double total = 0, moment = 0, absent = 0;
    for (auto& column : kept) {
      double h = gradient.log_p[r * gradient.log_p_stride + column.slot];
      if (r == 0 && gradient.kept) h += double(gradient.mass) * std::exp(double(gradient.kept[column.slot]));
      const A below = A(wide(x[column.column])) - saved.peak;
      total += h;
      (below == A(-INFINITY) ? absent : moment) += below == A(-INFINITY) ? h : h * double(below);
      column.gradient += A(h / scaled);
    }
    const double lse = r == 0 ? double(gradient.lse) : 0.0;
    all_temperatures += total;
    moment += double(saved.peak) * (lse - absent) - (total - lse) * double(saved.expected[r * saved.stride]);
    through_deviation += moment / rows.temperatures[r];
    factors[r] = A(kLog2E / scaled);
    weights[r] = A((lse - total) * std::exp(-double(saved.log_total[r * saved.stride])) / scaled);
  }
  std::sort(kept.begin(), kept.end(),
            [](const auto& a, const auto& b) { return a.column != b.column ? a.column < b.column : a.slot < b.slot; });

  Temperatures kind = R == 1 ? Temperatures::one : Temperatures::several;
  if (R == 2 && rows.temperatures[0] == 2 * rows.temperatures[1]) kind = Temperatures::squared;
  if (R == 2 && rows.temperatures[1] == 2 * rows.temperatures[0]) {
    std::swap(factors[0], factors[1]), std::swap(weights[0], weights[1]);
    kind = Temperatures::squared;
  }
  const A slope = A(-double(saved.slope) * through_deviation);
  bool plain = slope == 0;
  for (const A weight : weights) plain = plain && std::isfinite(weight);
  const auto chunk = gradient_chunk_of<T>(kind, plain);
  const DenseGradient<A> dense{saved.peak, saved.mean, slope, factors.data(), weights.data(), R};
  for (size_t next = 0, start = 0; start < size_t(rows.vocab_size); start += kGradientChunk) {
    const int64_t n = std::min(kGradientChunk, rows.vocab_size - int64_t(start));
    chunk(x + start, n, dense, out + start);
    // A kept column's gradient is made anew: the one that was written is rounded.
    while (next < kept.size() && kept[next].column < int64_t(start) + n) {
      const int64_t column = kept[next].column;
      A own = 0;
      for (; next < kept.size() && kept[next].column == column; ++next) own += kept[next].gradient;
      const A below = A(wide(x[column])) - saved.peak;
      if (below == A(-INFINITY)) continue;
      own += (below - saved.mean) * slope;
      for (int64_t r = 0; r < R; ++r) own += std::exp2(below * factors[r]) * weights[r];
      narrow(own, out[column]);
    }
  }
  return A(all_temperatures);
}

// All of grad_values [B, T, width] and of grad_log_scale [B, A].
//
// Args:
//   gradient_of: slot -> GradientOfRow.
template <class T, class GradientOf>
static inline void gradient_of_rows(const LogitsRows& rows, const SavedScalars<const void*>& saved, void* grad_values,
                                    void* grad_log_scale, const Parallel& parallel, const GradientOf& gradient_of) {
  using A = Accumulator<T>;
  const auto at = [](const void* scalars, int64_t slot) { return static_cast<const A*>(scalars)[slot]; };
  std::fill_n(static_cast<A*>(grad_log_scale), rows.all_slots(), A(0));
  write_rows<T>(rows, grad_values, parallel, [&](int64_t slot, T* out) {
    const ScalarsOfRow<A> scalars{
        .log_total = static_cast<const A*>(saved.log_total) + slot,
        .expected = static_cast<const A*>(saved.expected) + slot,
        .stride = rows.all_slots(),
        .peak = at(saved.peak, slot),
        .mean = at(saved.mean, slot),
        .scale = at(saved.scale, slot),
        .slope = at(saved.slope, slot),
    };
    static_cast<A*>(grad_log_scale)[slot] = row_gradient(rows, row_of<T>(rows, slot), scalars, gradient_of(slot), out);
  });
}

}  // namespace mlot::MLOT_ISA
