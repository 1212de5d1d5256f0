// A row of logits becomes the scalars of its distribution, as mlot_kernels/logits.py defines them.
#pragma once

#include "mlot/cuda/rows.h"

namespace mlot::cuda {

constexpr double kSmallest = -1e4;  // of t: 2^t is 0, and 2^t t is still a number

// Sums over columns of 2^t and of t 2^t, with t = (x - peak) factor.
template <class A>
struct ExponentialSums {
  A peak = -INFINITY, total = 0, moment = 0;

  // The same sums relative to a higher peak: every t falls.
  __device__ void raise(A higher, A factor) {
    if (peak != A(-INFINITY)) {  // else they are 0, or NaN
      const A fall = (peak - higher) * factor, shrink = power_of_two(fall);
      moment = shrink * (moment + fall * total);
      total *= shrink;
    }
    peak = higher;
  }
};

// Raises `sums` to the largest of the vectors x, and returns what their columns are taken from: their peak, or 0 while
// it is -inf, where all 2^t are 0, or NaN, which shows.
template <class Sums, class A, int kBatch, int kLanes>
__device__ inline A raise_to(Sums& sums, const A (&x)[kBatch][kLanes], A factor) {
  A highest = sums.peak;
#pragma unroll
  for (const auto& vector : x) {
#pragma unroll
    for (A value : vector) highest = larger(highest, value);
  }
  if (highest > sums.peak) sums.raise(highest, factor);
  return sums.peak == A(-INFINITY) ? A(0) : sums.peak;
}

template <class A>
struct RowStatistics {
  Scale<A> scale;
  double log_total, expected;
};

constexpr int kStatisticsBatch = 2;  // vectors that a thread reads before it uses them

template <class A>
constexpr unsigned kStatisticsBytes = kOverCluster<Deviation<A>>;  // the larger of the two that are joined

// A cluster reads a row once, standardized twice; every thread gets the same.
template <bool kStandardize, class T, class A = Accumulator<T>>
__device__ inline RowStatistics<A> statistics(const T* row, const LogitsRows& rows, void* shared) {
  RowStatistics<A> made;
  if constexpr (kStandardize) made.scale = standardized(row, rows.vocab_size, shared);
  const double factor = kLog2E / (rows.temperature * double(made.scale.scale));
  ExponentialSums<A> mine;
  for_vectors<kStatisticsBatch>(row, rows.vocab_size, [&](int64_t, int64_t, const A(&x)[kStatisticsBatch][kLanes<T>]) {
    const A below = raise_to(mine, x, A(factor));
#pragma unroll
    for (const auto& vector : x) {
#pragma unroll
      for (A value : vector) {
        const A t = (value - below) * A(factor), e = power_of_two(t);
        mine.total += e;
        mine.moment += e * larger(t, A(kSmallest));
      }
    }
  });
  const auto join = [factor](ExponentialSums<A> a, ExponentialSums<A> b) {
    a.raise(larger(a.peak, b.peak), A(factor));
    b.raise(a.peak, A(factor));
    a.total += b.total;
    a.moment += b.moment;
    return a;
  };
  const auto all = over_cluster(mine, join, static_cast<ExponentialSums<A>*>(shared));
  const double total = all.peak == A(-INFINITY) ? NAN : double(all.total);  // a row of -inf alone is 0 / 0
  made.scale.peak = all.peak;
  made.log_total = log(total);
  made.expected = double(all.moment) / (total * factor);
  return made;
}

template <class A>
__device__ inline void save(const SavedScalars<void*>& saved, int64_t slot, const RowStatistics<A>& row) {
  put<A>(saved.log_total, slot, row.log_total);
  put<A>(saved.expected, slot, row.expected);
  put<A>(saved.peak, slot, row.scale.peak);
  put<A>(saved.mean, slot, row.scale.mean);
  put<A>(saved.scale, slot, row.scale.scale);
  put<A>(saved.slope, slot, row.scale.slope);
}

}  // namespace mlot::cuda
