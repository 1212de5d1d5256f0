// Costs between all pairs of the feature vectors of two sides, x for the rows of the cost matrix and y for its columns,
// and their gradient: tiles of pairs that stay in registers, and nothing of the size of pairs times features.
//
// Every sum is added in an order that depends on the problem's size alone. A pair's cost does not depend on which rows
// are asked for with it, and a row's gradient neither; the gradient of y is added up over the rows of one call.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "mlot/cpu/features.h"

namespace mlot::MLOT_ISA {

constexpr int64_t kTileRows = 4;   // rows of a tile, whose costs with a panel of columns are in registers
constexpr int64_t kSumTerms = 64;  // terms that are added one after the other; their sums are added then

template <class A>
MLOT_INLINE Vector<A> with_bits(VectorBits<A> bits) {
  return std::bit_cast<Vector<A>>(bits);
}

template <class A>
MLOT_INLINE VectorBits<A> bits_of(Vector<A> v) {
  return std::bit_cast<VectorBits<A>>(v);
}

template <class A>
constexpr auto kSignBit = std::bit_cast<decltype(VectorBits<A>{}[0] + 0)>(A(-0.0));

// 1, and no compiler knows it: a difference is then x times it minus y, one instruction, exactly as large, that does
// not run on the additions' units.
template <class A>
MLOT_INLINE Vector<A> hidden_one() {
  Vector<A> one = all(A(1));
#ifdef __FMA__
  asm("" : "+v"(one));
#endif
  return one;
}

// Adds up the terms of n features of a panel of x and a panel of y.
template <Metric metric, class A>
MLOT_INLINE void add_terms(const A* x, const A* y, int64_t n, Vector<A> (&sums)[kTileRows][2]) {
  const Vector<A> minus_infinity = all(A(-INFINITY)), one = hidden_one<A>();
  for (int64_t d = 0; d < n; ++d, x += kPanel<A>, y += kPanel<A>) {
    const Vector<A> column[2] = {load(y), load(y + kWidth<A>)};
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const Vector<A> row = all(x[r]);
      if constexpr (metric == Metric::cosine) {
        for (int h = 0; h < 2; ++h) sums[r][h] += row * column[h];
      } else if constexpr (metric == Metric::cross_entropy) {
        // Where x is 0, the log of 0 counts as the smallest number, whose bits are those of -inf less 1.
        const Vector<A> least = with_bits<A>(bits_of<A>(minus_infinity) + VectorBits<A>(row == Vector<A>{}));
        for (int h = 0; h < 2; ++h) sums[r][h] += row * larger(least, column[h]);
      } else if constexpr (metric == Metric::l1) {
        const Vector<A> difference[2] = {row * one - column[0], row * one - column[1]};
        for (int h = 0; h < 2; ++h) sums[r][h] += with_bits<A>(bits_of<A>(difference[h]) & ~kSignBit<A>);
      } else {
        for (int h = 0; h < 2; ++h) sums[r][h] += (row - column[h]) * (row - column[h]);
      }
    }
  }
}

// The sums of the terms of D features of a panel of x and a panel of y, [rows][columns].
template <Metric metric, class A>
MLOT_INLINE void sum_terms(const A* x, const A* y, int64_t D, Vector<A> (&total)[kTileRows][2]) {
  add_terms<metric, A>(x, y, std::min(kSumTerms, D), total);
  for (int64_t d = kSumTerms; d < D; d += kSumTerms) {
    Vector<A> sums[kTileRows][2] = {};
    add_terms<metric, A>(x + d * kPanel<A>, y + d * kPanel<A>, std::min(kSumTerms, D - d), sums);
    for (int r = 0; r < kTileRows; ++r) {
      for (int h = 0; h < 2; ++h) total[r][h] += sums[r][h];
    }
  }
}

// A cost from the sum of its terms.
template <Metric metric, class A>
MLOT_INLINE Vector<A> cost_of(Vector<A> sum) {
  if constexpr (metric == Metric::l2) {
    for (int l = 0; l < kWidth<A>; ++l) sum[l] = std::sqrt(sum[l]);
  }
  if constexpr (metric == Metric::cosine) return A(1) - sum;
  if constexpr (metric == Metric::cross_entropy) return -sum;
  return sum;
}

template <Metric metric, class A>
static inline void cost_rows_of(const Features<A>& x, int64_t first, int64_t last, const Features<A>& y, A* out,
                                int64_t out_stride) {
  for (int64_t j = 0; j < y.rows(); j += kPanel<A>) {
    const int64_t columns = std::min(kPanel<A>, y.rows() - j);
    for (int64_t start = first / kTileRows * kTileRows; start < last; start += kTileRows) {
      Vector<A> total[kTileRows][2] = {};
      sum_terms<metric, A>(x.column(start), y.column(j), x.width(), total);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        const int64_t i = start + r;
        if (i < first || i >= last) continue;
        A* to = out + (i - first) * out_stride + j;
        const Pair<A> costs{{cost_of<metric, A>(total[r][0]), cost_of<metric, A>(total[r][1])}};
        if (columns == kPanel<A>) {
          store_pair<A>(costs, to);
        } else {
          __builtin_memcpy(to, &costs, size_t(columns) * sizeof(A));
        }
      }
    }
  }
}

// Writes the costs of rows [first, last) of x with all rows of y: row i to out + (i - first) * out_stride. The same
// bits whichever rows are asked for together.
template <class A>
static inline void cost_rows(const Features<A>& x, int64_t first, int64_t last, const Features<A>& y, A* out,
                             int64_t out_stride) {
  switch (x.metric()) {
    case Metric::l1:
      return cost_rows_of<Metric::l1>(x, first, last, y, out, out_stride);
    case Metric::l2:
      return cost_rows_of<Metric::l2>(x, first, last, y, out, out_stride);
    case Metric::sqeuclidean:
      return cost_rows_of<Metric::sqeuclidean>(x, first, last, y, out, out_stride);
    case Metric::cosine:
      return cost_rows_of<Metric::cosine>(x, first, last, y, out, out_stride);
    case Metric::cross_entropy:
      return cost_rows_of<Metric::cross_entropy>(x, first, last, y, out, out_stride);
  }
}

// What one pair's feature passes on, before its weight.
template <class A>
struct Derivative {
  Vector<A> for_x, for_y;
};

// Args:
//   Finite: all features are, so that a difference is NaN nowhere.
//   absent: of cross_entropy: y is the log of 0.
template <Metric metric, bool Finite, class A>
MLOT_INLINE Derivative<A> derivative(Vector<A> x, Vector<A> y, [[maybe_unused]] VectorBits<A> absent,
                                     [[maybe_unused]] Vector<A> weight) {
  if constexpr (metric == Metric::cosine) {
    return {y, x};
  } else if constexpr (metric == Metric::cross_entropy) {
    const auto dead = VectorBits<A>(x == A(0)) | VectorBits<A>(weight == A(0));
    const Vector<A> factor = with_bits<A>(bits_of<A>(all(A(1))) | (absent & bits_of<A>(all(A(INFINITY)))));
    return {with_bits<A>(bits_of<A>(y) & ~(absent & dead)), with_bits<A>(bits_of<A>(x * factor) & ~dead)};
  } else {
    Vector<A> difference = x - y;
    if constexpr (metric == Metric::l1) {
      const auto differs = VectorBits<A>(difference != A(0));
      auto sign = ((bits_of<A>(difference) & kSignBit<A>) | bits_of<A>(all(A(1)))) & differs;
      if constexpr (!Finite) sign |= VectorBits<A>(difference != difference);  // all bits are those of a NaN
      difference = with_bits<A>(sign);
    }
    return {difference, -difference};
  }
}

// Rows [i, i + R) with columns [first, last), one vector of features.
template <Metric metric, bool Finite, bool ForX, bool ForY, int R, class A>
MLOT_INLINE void backward_tile(const Features<A>& x, int64_t i, const Features<A>& y, int64_t first, int64_t last,
                               int64_t block, const A* weights, int64_t stride, A* x_sums, A* y_sums) {
  Vector<A> row[R], sums[R] = {};
  for (int r = 0; r < R; ++r) row[r] = load(x.vector(block, i + r));
  const A* from = y.vector(block, 0);
  A* to = ForY ? y.at(y_sums, block, 0) : nullptr;
  for (int64_t j = first; j < last; ++j) {
    const Vector<A> column = load(from + j * kWidth<A>);
    const auto absent = VectorBits<A>(column == A(-INFINITY));
    Vector<A> of_column = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vector<A> weight = all(weights[r * stride + j]);
      const Derivative<A> passed = derivative<metric, Finite, A>(row[r], column, absent, weight);
      if constexpr (ForX) sums[r] += weight * passed.for_x;
      if constexpr (ForY) of_column += weight * passed.for_y;
    }
    if constexpr (ForY) store<A>(load(to + j * kWidth<A>) + of_column, to + j * kWidth<A>);
  }
  if constexpr (ForX) {
    for (int r = 0; r < R; ++r) {
      A* sum = x.at(x_sums, block, i + r);
      store<A>(load(sum) + sums[r], sum);
    }
  }
}

template <Metric metric, bool Finite, bool ForX, bool ForY, class A>
static inline void backward_rows_of(const Features<A>& x, int64_t first, int64_t last, const Features<A>& y,
                                    const A* weights, int64_t stride, A* x_sums, A* y_sums) {
  for (int64_t block = 0; block < x.blocks(); ++block) {
    for (int64_t j = 0; j < y.rows(); j += kSumTerms) {  // so few that they stay in the L1 cache
      const int64_t end = std::min(j + kSumTerms, y.rows());
      int64_t i = first;
      for (; i + kTileRows <= last; i += kTileRows) {
        backward_tile<metric, Finite, ForX, ForY, kTileRows>(x, i, y, j, end, block, weights + (i - first) * stride,
                                                             stride, x_sums, y_sums);
      }
      for (; i < last; ++i) {
        backward_tile<metric, Finite, ForX, ForY, 1>(x, i, y, j, end, block, weights + (i - first) * stride, stride,
                                                     x_sums, y_sums);
      }
    }
  }
}

template <Metric metric, bool Finite, class A>
static inline void backward_rows_of(const Features<A>& x, int64_t first, int64_t last, const Features<A>& y,
                                    const A* weights, int64_t stride, A* x_sums, A* y_sums) {
  if (x_sums && y_sums) {
    backward_rows_of<metric, Finite, true, true>(x, first, last, y, weights, stride, x_sums, y_sums);
  } else if (x_sums) {
    backward_rows_of<metric, Finite, true, false>(x, first, last, y, weights, stride, x_sums, y_sums);
  } else if (y_sums) {
    backward_rows_of<metric, Finite, false, true>(x, first, last, y, weights, stride, x_sums, y_sums);
  }
}

// Adds what rows [first, last) of the upstream gradient pass on: to rows [first, last) of x_sums, which no other call
// may touch at the time, and to all of y_sums. Either is null where that side needs no gradient.
// Features::write_gradient makes gradients of the sums once all rows are added.
//
// Args:
//   weights: [last - first, y.rows()], `stride` elements from row to row: the upstream gradient itself, but for l2 what
//     l2_weights makes of it.
//   x_sums, y_sums: sums_size() elements of that side each, zeros at first. Rows are added to y_sums four at a time,
//     counted from `first`: the same bits for the same calls in the same order.
template <class A>
static inline void cost_backward_rows(const Features<A>& x, int64_t first, int64_t last, const Features<A>& y,
                                      const A* weights, int64_t stride, A* x_sums, A* y_sums) {
  switch (x.metric()) {
    case Metric::l1:
      if (x.finite() && y.finite()) {
        return backward_rows_of<Metric::l1, true>(x, first, last, y, weights, stride, x_sums, y_sums);
      }
      return backward_rows_of<Metric::l1, false>(x, first, last, y, weights, stride, x_sums, y_sums);
    case Metric::l2:
    case Metric::sqeuclidean:
      return backward_rows_of<Metric::sqeuclidean, true>(x, first, last, y, weights, stride, x_sums, y_sums);
    case Metric::cosine:
      return backward_rows_of<Metric::cosine, true>(x, first, last, y, weights, stride, x_sums, y_sums);
    case Metric::cross_entropy:
      return backward_rows_of<Metric::cross_entropy, true>(x, first, last, y, weights, stride, x_sums, y_sums);
  }
}

// The weights that cost_backward_rows takes for l2, of n pairs: the upstream gradient divided by the cost. May be made
// in place.
template <class A>
static inline void l2_weights(const A* grad, const A* cost, int64_t n, A* weights) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) weights[j] = grad[j] / (cost[j] == 0 ? A(1) : cost[j]);
}

}  // namespace mlot::MLOT_ISA
