// A row of logits becomes the scalars of its distribution, as mlot_kernels/logits.py defines them.
#pragma once

#include "mlot/cuda/rows.h"
#include "mlot/scalars.h"

namespace mlot::cuda {

constexpr double kSmallest = -1e4;  // of t: 2^t is 0, and 2^t t is still a number

// Sums over columns of 2^t and of (x - peak) 2^t, with t = (x - peak) factor. Where there are two, the second is of the
// squares of these 2^t: of half the temperature.
template <class A, int kCount>
struct ExponentialSums {
  A peak = -INFINITY, total[kCount] = {}, moment[kCount] = {};

  // One more column, `below` = x - peak. Returns its 2^t.
  __device__ A add(A below, A factor) {
    constexpr A kLowest = sizeof(A) == 8 ? A(-1e300) : A(-1e38f);  // 0 times it is still a number
    const A e = power_of_two(below * factor), finite = larger(below, kLowest);
    A power = e;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      total[i] += power;
      moment[i] += power * finite;
      power *= e;
    }
    return e;
  }

  // The same sums relative to a higher peak.
  __device__ void raise(A higher, A factor) {
    if (peak != A(-INFINITY)) {  // else they are 0, or NaN
      const A fall = peak - higher, shrink = power_of_two(fall * factor);
      A power = shrink;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        moment[i] = power * (moment[i] + fall * total[i]);
        total[i] *= power;
        power *= shrink;
      }
    }
    peak = higher;
  }
};

template <class A, int kCount>
__device__ inline ExponentialSums<A, kCount> join(ExponentialSums<A, kCount> a, ExponentialSums<A, kCount> b,
                                                  A factor) {
  a.raise(larger(a.peak, b.peak), factor);
  b.raise(a.peak, factor);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    a.total[i] += b.total[i];
    a.moment[i] += b.moment[i];
  }
  return a;
}

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

// Of a row's sums at one temperature. A row of -inf alone has 0 / 0.
template <class A>
__device__ inline A total_of(A total, A peak) {
  return peak == A(-INFINITY) ? A(NAN) : total;
}

template <class A, int kCount>
struct RowStatistics {
  Scale<A> scale;
  double log_total[kCount], expected[kCount];
};

constexpr int kStatisticsBatch = 2;  // vectors that a thread reads before it uses them

template <class A, int kCount>
constexpr unsigned kStatisticsBytes = kCount > 1 ? kJoin<ExponentialSums<A, kCount>> : kJoin<Deviation<A>>;

struct LooksAtNothing {
  template <class A, int kBatch, int kLanes>
  __device__ void operator()(int64_t, int64_t, const A (&)[kBatch][kLanes]) const {}
};

// A cluster reads a row once, standardized twice; every thread gets the same. At `temperature` and, where kCount is 2,
// at half of it. `look` gets the vectors that the sums are made of, as for_vectors passes them.
template <bool kStandardize, int kCount, class T, class Look = LooksAtNothing, class A = Accumulator<T>>
__device__ inline RowStatistics<A, kCount> statistics(const T* row, const LogitsRows& rows, double temperature,
                                                      void* shared, Look look = {}) {
  using Sums = ExponentialSums<A, kCount>;
  constexpr int kBatch = kStatisticsBatch;
  RowStatistics<A, kCount> made;
  if constexpr (kStandardize) made.scale = standardized(row, rows.vocab_size, shared);
  const A factor = A(kLog2E / (temperature * double(made.scale.scale)));
  Sums mine;
  for_vectors<kBatch>(row, rows.vocab_size, [&](int64_t first, int64_t step, const A(&x)[kBatch][kLanes<T>]) {
    look(first, step, x);
    const A below = raise_to(mine, x, factor);
#pragma unroll
    for (const auto& vector : x) {
#pragma unroll
      for (A value : vector) mine.add(value - below, factor);
    }
  });
  const auto all = over_cluster(mine, [=](Sums a, Sums b) { return join(a, b, factor); }, static_cast<Sums*>(shared));
  made.scale.peak = all.peak;
  for (int i = 0; i < kCount; ++i) {
    const double total = total_of(all.total[i], all.peak);
    made.log_total[i] = log(total);
    made.expected[i] = double(all.moment[i]) / total;
  }
  return made;
}

// What a row has at every temperature alike.
template <class A>
__device__ inline void save(const SavedScalars<void*>& saved, int64_t slot, const Scale<A>& scale) {
  put<A>(saved.peak, slot, scale.peak);
  put<A>(saved.mean, slot, scale.mean);
  put<A>(saved.scale, slot, scale.scale);
  put<A>(saved.slope, slot, scale.slope);
}

}  // namespace mlot::cuda
