// Sinkhorn's steps on log-scalings of base 2: F = log2 u, G = log2 v, X = -C log2(e) / epsilon.
//
// Logarithms of sums stand on the largest term, so that nothing overflows at any epsilon. -inf is a forbidden pair; a
// row or column of nothing else gives NaN.
#pragma once

#include <limits>

#include "mlot/cpu/sinkhorn_problem.h"

namespace mlot::MLOT_ISA {

// 2^(t - peak) where nothing is above `peak`, which may be -inf.
template <class A>
MLOT_INLINE Vector<A> exp2_below(Vector<A> t, Vector<A> shift) {
  return exp2_negative<A>(at_least_smallest<A>(t - shift));
}

// What terms up to `peak` are made relative to: -inf less -inf would be NaN where there is merely nothing.
template <class A>
MLOT_INLINE Vector<A> shift_of(Vector<A> peak) {
  return larger(all(std::numeric_limits<A>::lowest()), peak);
}

// log2 sum_j 2^(X_j + G_j) over one row of costs.
template <class A>
static inline double log_row(const A* cost, int64_t width, A scale, const A* G) {
  Vector<A> highest = all(A(-INFINITY)), total[2] = {};
  for (int64_t j = 0; j < width; j += kWidth<A>) highest = larger(load(G + j) - load(cost + j) * scale, highest);
  const A peak = largest<A>(highest);
  const Vector<A> shift = shift_of<A>(all(peak));
  for (int64_t j = 0; j < width; j += 2 * kWidth<A>) {
    for (int h = 0; h < 2; ++h) {
      const int64_t k = j + h * kWidth<A>;
      total[h] += exp2_below<A>(load(G + k) - load(cost + k) * scale, shift);
    }
  }
  return double(shift[0]) + std::log2(double(sum<A>(total[0] + total[1])));
}

// 2^(X + F) summed over columns, as sum 2^peak. Both [width].
template <class A>
struct ColumnTotals {
  Buffer<A> peak, sum, scratch;
};

// Adds the 4 rows at `cost`, or the last ones, to a slab's column totals.
template <int R, class A>
MLOT_INLINE void add_to_columns(const A* cost, int64_t stride, int64_t width, A scale, const A* F, A* peak, A* sum) {
  for (int64_t j = 0; j < width; j += kWidth<A>) {
    const Vector<A> before = load(peak + j);
    Vector<A> x[R], highest = before;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      x[r] = F[r] - load(cost + r * stride + j) * scale;
      highest = larger(x[r], highest);
    }
    const Vector<A> shift = shift_of<A>(highest);
    Vector<A> total = load(sum + j) * exp2_below<A>(before, shift);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total += exp2_below<A>(x[r], shift);
    store(highest, peak + j), store(total, sum + j);
  }
}

// The column totals of F [m]; before a row's turn, before_row(i) may write F[i].
template <class A, class BeforeRow>
static inline void total_columns(const Problem<A>& p, const Slabs<A>& slabs, const A* F, ColumnTotals<A>& totals,
                                 const BeforeRow& before_row) {
  const int64_t width = p.width, count = slabs.count();
  A *peak = totals.peak.resize(width), *sum = totals.sum.resize(width);
  A* partial = totals.scratch.resize(count * 2 * width);
  slabs.run([&](int64_t slab, int64_t first, int64_t last) {
    A *slab_peak = partial + slab * 2 * width, *slab_sum = slab_peak + width;
    std::fill_n(slab_peak, width, A(-INFINITY)), std::fill_n(slab_sum, width, A(0));
    for (int64_t i = first; i < last;) {
      const bool four = i + 4 <= last;
      for (int64_t r = i; r < i + (four ? 4 : 1); ++r) before_row(r);
      const auto add = four ? add_to_columns<4, A> : add_to_columns<1, A>;
      add(p.row(i), p.cost_stride, width, p.scale, F + i, slab_peak, slab_sum);
      i += four ? 4 : 1;
    }
  });
  for (int64_t j = 0; j < width; j += kWidth<A>) {
    Vector<A> highest = load(partial + j), total = {};
    for (int64_t s = 1; s < count; ++s) highest = larger(load(partial + s * 2 * width + j), highest);
    const Vector<A> shift = shift_of<A>(highest);
    for (int64_t s = 0; s < count; ++s) {
      const A* at = partial + s * 2 * width + j;
      total += load(at + width) * exp2_below<A>(load(at), shift);
    }
    store(shift, peak + j), store(total, sum + j);
  }
}

template <class A>
MLOT_INLINE double log_column(const Problem<A>& p, const ColumnTotals<A>& totals, int64_t j) {
  return p.log_b[j] - (double(totals.peak[j]) + std::log2(double(totals.sum[j])));
}

// One step: G [width] becomes F [m], and F the columns' totals.
template <class A>
static inline void log_step(const Problem<A>& p, const Slabs<A>& slabs, const A* G, A* F, ColumnTotals<A>& totals) {
  total_columns(p, slabs, F, totals, [&](int64_t i) { F[i] = A(p.log_a[i] - log_row(p.row(i), p.width, p.scale, G)); });
}

// P [m, width] after a column step from F: b times a softmax of X + F over the column, whose sums are exact however
// large F is.
template <class A>
static inline void log_plan(const Problem<A>& p, const Slabs<A>& slabs, const A* F, const ColumnTotals<A>& totals,
                            Buffer<A>& factors, A* plan) {
  A* factor = factors.resize(p.width);
  for (int64_t j = 0; j < p.n; ++j) factor[j] = p.b[j] / totals.sum[j];
  std::fill(factor + p.n, factor + p.width, A(0));
  slabs.run([&](int64_t, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      for (int64_t j = 0; j < p.width; j += kWidth<A>) {
        const Vector<A> e = exp2_below<A>(F[i] - load(p.row(i) + j) * p.scale, load(totals.peak.get() + j));
        store(e * load(factor + j), plan + i * p.width + j);
      }
    }
  });
}

}  // namespace mlot::MLOT_ISA
