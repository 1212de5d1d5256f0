// One row of logits, owned by a cluster of blocks: which row it is, how its vectors are shared, its deviation.
//
// A vector's owner depends on its columns alone, so that a row's sums are the same to the bit wherever it lies in
// memory.
#pragma once

#include <cmath>

#include "mlot/cuda/device.h"
#include "mlot/cuda/logits.h"

namespace mlot::cuda {

constexpr double kDeviationOffset = 1e-4;  // of the published Multi-Level-OT code, added after the square root

// The row of `slot`; null where none counts there.
template <class T>
__device__ inline const T* row_of(const LogitsRows& rows, int64_t slot) {
  const int64_t position = rows.index[slot];
  if (position < 0) return nullptr;
  return static_cast<const T*>(rows.values) + slot / rows.slots * rows.batch_stride + position * rows.row_stride;
}

__device__ inline int64_t slots_of(const LogitsRows& rows) { return rows.sequences * rows.slots; }

template <class A>
__device__ inline A at(const void* scalars, int64_t i, A otherwise = 0) {
  return scalars ? static_cast<const A*>(scalars)[i] : otherwise;
}

template <class A>
__device__ inline void put(void* scalars, int64_t i, double x) {
  static_cast<A*>(scalars)[i] = A(x);
}

// Calls use(first column, step, kBatch vectors of which number i begins i steps behind the first) for this thread's
// share of a row, -inf behind `end`: kBatch loads are on their way at once. All lanes of a warp take part in each call,
// and their vectors number i are neighbours.
template <int kBatch, class T, class Use>
__device__ inline void for_vectors(const T* row, int64_t end, Use use) {
  const int64_t step = int64_t(blockDim.x) * kLanes<T>, lane = threadIdx.x % kWarp;
  const int64_t stride = cluster_size() * step * kBatch;
  for (int64_t first = cluster_rank() * step * kBatch + threadIdx.x * kLanes<T>; first - lane * kLanes<T> < end;
       first += stride) {
    Accumulator<T> x[kBatch][kLanes<T>];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) load(row, first + i * step, end, Accumulator<T>(-INFINITY), x[i]);
    use(first, step, x);
  }
}

// Of columns that are not -inf: how many, their largest, the mean of x - peak, and the sum of squares about that mean.
template <class A>
struct Deviation {
  A count = 0, peak = -INFINITY, mean = 0, squares = 0;
};

// By the rule of Chan, Golub and LeVeque.
template <class A>
__device__ inline Deviation<A> join(const Deviation<A>& a, const Deviation<A>& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  Deviation<A> both;
  both.count = a.count + b.count;
  both.peak = larger(a.peak, b.peak);
  const A share = b.count / both.count, difference = (b.peak - a.peak) + (b.mean - a.mean);
  both.mean = (a.peak - both.peak) + a.mean + difference * share;
  both.squares = a.squares + b.squares + difference * difference * (a.count * share);
  return both;
}

// What a standardized row is divided by, and what its gradient needs.
template <class A>
struct Scale {
  A peak = -INFINITY, mean = 0, scale = 1, slope = 0;
};

// Reads the row once; every thread of the cluster gets the same. `shared` has room for kJoin<Deviation<A>>.
template <class T, class A = Accumulator<T>>
__device__ inline Scale<A> standardized(const T* row, int64_t end, void* shared) {
  Deviation<A> mine;
  for_vectors<2>(row, end, [&](int64_t, int64_t, const A(&x)[2][kLanes<T>]) {
    Deviation<A> part;
#pragma unroll
    for (const auto& vector : x) {
#pragma unroll
      for (A value : vector) part.peak = larger(part.peak, value), part.count += value == A(-INFINITY) ? A(0) : A(1);
    }
    if (part.count == 0) return;
    const A peak = part.peak == A(-INFINITY) ? A(0) : part.peak;  // of NaN alone
    A total = 0;
#pragma unroll
    for (const auto& vector : x) {
#pragma unroll
      for (A value : vector) total += value == A(-INFINITY) ? A(0) : value - peak;
    }
    part.mean = total / part.count;
#pragma unroll
    for (const auto& vector : x) {
#pragma unroll
      for (A value : vector) {
        const A rest = value == A(-INFINITY) ? A(0) : value - peak - part.mean;
        part.squares += rest * rest;
      }
    }
    mine = join(mine, part);
  });
  const auto all =
      over_cluster(mine, [](const auto& a, const auto& b) { return join(a, b); }, static_cast<Deviation<A>*>(shared));
  const double count = all.count, spread = sqrt(double(all.squares) / fmax(count - 1, 1.0));
  const double scale = spread + kDeviationOffset;
  const bool flat = spread == 0 || count < 2;
  return {all.peak, all.mean, A(scale), A(flat ? 0 : 1 / ((count - 1) * spread * scale * scale))};
}

// Launches what writes which slot counts each row of [B, T], -1 where none does.
void write_slots(const LogitsRows& rows, int32_t* slot_of, void* stream);

}  // namespace mlot::cuda
