// What CUDA kernels are written in. Two compilers read them unchanged: nvcc, and a host compiler with cuda_on_host.h,
// which runs a kernel's threads one after the other so that its values are tested without a GPU.
//
// Shared memory is dynamic; 16-bit floats are storage, arithmetic is in their accumulator; what exists on a device
// alone stands behind __CUDA_ARCH__ with a plain branch beside it.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#define MLOT_SHARED_MEMORY(T, name)                          \
  extern __shared__ __align__(16) unsigned char name##_of[]; \
  T* name = reinterpret_cast<T*>(name##_of)
#else
#include "cuda_on_host.h"
#define MLOT_SHARED_MEMORY(T, name) T* name = static_cast<T*>(cuda_on_host::shared_memory())
#endif

#include <cstdint>
#include <cstring>

namespace mlot::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kThreads = 256;  // of a block that owns a row, or a part of one

// Numbers

constexpr double kLog2E = 1.4426950408889634, kLog2 = 0.6931471805599453;

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(float16 x) { return __half2float(x); }

__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(double x, double& y) { y = x; }
__device__ inline void narrow(float x, bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, float16& y) { y = __float2half_rn(x); }

#ifdef __CUDA_ARCH__
__device__ inline float power_of_two(float x) {  // one instruction; what is below 2^-126 is 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
__device__ inline float power_of_two(float x) { return exp2f(x); }
#endif
__device__ inline double power_of_two(double x) { return exp2(x); }
// Rounded by itself: the compiler makes it no part of another operation, so that equal products differ by 0.
__device__ inline float rounded_product(float x, float y) { return __fmul_rn(x, y); }
__device__ inline double rounded_product(double x, double y) { return __dmul_rn(x, y); }
__device__ inline float larger(float x, float y) { return fmaxf(x, y); }  // passes over NaN
__device__ inline double larger(double x, double y) { return fmax(x, y); }

// Vectors of 16 bytes

template <class T>
constexpr int kLanes = 16 / int(sizeof(T));

template <class T>
struct alignas(16) Vector {
  T lane[kLanes<T>];
};

#ifdef __CUDA_ARCH__
// The 16 bytes that begin `shift` bytes into 32, where `shift` is a multiple of T's size.
template <class T>
__device__ inline uint4 bytes_from(uint4 low, uint4 high, unsigned shift) {
  unsigned w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
  if constexpr (sizeof(T) < 8) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
  }
  if constexpr (sizeof(T) < 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = shift & 2 ? __funnelshift_r(w[i], w[i + 1], 16) : w[i];
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}
#endif

// Columns `first`, `first` + 1, ... of a row, widened; `fill` where a column is not in [0, end).
//
// A row may start at any element: it is read by the aligned 16 bytes that its columns lie in, of which two threads that
// are neighbours share one. So up to 14 bytes in front of and behind the row are read, too, and dropped: an allocation
// begins and ends at a multiple of 16.
template <class T>
__device__ inline void load(const T* row, int64_t first, int64_t end, Accumulator<T> fill,
                            Accumulator<T> (&x)[kLanes<T>]) {
  Vector<T> v;
#ifdef __CUDA_ARCH__
  const auto begin = reinterpret_cast<uintptr_t>(row + first), stop = reinterpret_cast<uintptr_t>(row + end);
  const unsigned shift = begin % 16;
  const auto* at = reinterpret_cast<const uint4*>(begin - shift);
  uint4 low = make_uint4(0, 0, 0, 0), high = low;
  if (begin - shift < stop && begin - shift + 16 > reinterpret_cast<uintptr_t>(row)) low = __ldg(at);
  if (shift && begin - shift + 16 < stop) high = __ldg(at + 1);
  low = bytes_from<T>(low, high, shift);
  memcpy(&v, &low, sizeof(v));
#else
  for (int i = 0; i < kLanes<T>; ++i) {
    if (first + i >= 0 && first + i < end) v.lane[i] = row[first + i];
  }
#endif
  if (first >= 0 && first + kLanes<T> <= end) {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) x[i] = widen(v.lane[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) x[i] = first + i >= 0 && first + i < end ? widen(v.lane[i]) : fill;
  }
}

// Writes x to columns `first`, `first` + 1, ... of a row, those in [0, end). Whole vectors must be aligned.
template <class T>
__device__ inline void store(T* row, int64_t first, int64_t end, const Accumulator<T> (&x)[kLanes<T>]) {
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) narrow(x[i], v.lane[i]);
  if (first >= 0 && first + kLanes<T> <= end) {
    *reinterpret_cast<Vector<T>*>(row + first) = v;
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      if (first + i >= 0 && first + i < end) row[first + i] = v.lane[i];
    }
  }
}

// Starts the copy of 16 bytes into shared memory. What a thread starts between two calls of `end_of_copies` is a group.
__device__ inline void start_copy(uint4* to, const uint4* from) { __pipeline_memcpy_async(to, from, sizeof(uint4)); }
__device__ inline void end_of_copies() { __pipeline_commit(); }

// Waits for the groups that this thread has ended, but for the last one.
__device__ inline void wait_for_all_but_one() { __pipeline_wait_prior(1); }

// The vector that begins `shift` bytes, a multiple of T's size below 16, behind `lines`.
template <class T>
__device__ inline Vector<T> vector_at(const uint4* lines, unsigned shift) {
  Vector<T> v;
#ifdef __CUDA_ARCH__
  uint4 low = lines[0];
  if (shift) low = bytes_from<T>(low, lines[1], shift);
  memcpy(&v, &low, sizeof(v));
#else
  memcpy(&v, reinterpret_cast<const unsigned char*>(lines) + shift, sizeof(v));
#endif
  return v;
}

// How many columns of a row lie behind the last multiple of 16 bytes in front of it.
template <class T>
__device__ inline int columns_past_alignment(const T* row) {
  return int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// Clusters of blocks. Where the chip has none, a block is its own cluster.

constexpr unsigned kMostBlocks = 8;  // of a cluster, on every chip that has them

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ inline unsigned cluster_size() { return __clusterSizeInBlocks(); }
__device__ inline void cluster_arrive() { __cluster_barrier_arrive(); }
__device__ inline void cluster_wait() { __cluster_barrier_wait(); }
template <class S>
__device__ S* of_block(S* mine, unsigned rank) {
  return static_cast<S*>(__cluster_map_shared_rank(mine, rank));
}
#else
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline unsigned cluster_size() { return 1; }
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() { __syncthreads(); }
template <class S>
__device__ S* of_block(S* mine, unsigned) {
  return mine;
}
#endif

__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// What that lane of the warp holds, of any size. All lanes take part.
template <class S>
__device__ inline S from_lane(S value, int lane) {
  static_assert(sizeof(S) % sizeof(unsigned) == 0);
  unsigned words[sizeof(S) / sizeof(unsigned)];
  memcpy(words, &value, sizeof(S));
#pragma unroll
  for (unsigned& word : words) word = __shfl_sync(~0u, word, lane);
  memcpy(&value, words, sizeof(S));
  return value;
}

// What all lanes of a warp hold, joined; lane 0's may differ in bits from the others'.
template <class S, class Join>
__device__ inline S over_warp(S mine, Join join) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes; lanes /= 2) mine = join(mine, from_lane(mine, int(threadIdx.x % kWarp) ^ lanes));
  return mine;
}

// Joining what all threads of a cluster hold, in an order of its own: that of lanes, warps and blocks. S{} changes
// nothing that it is joined with. Shared memory has room for kJoin<S>, 16-byte aligned.
template <class S>
constexpr unsigned kJoin = ((kWarp + 2 * kMostBlocks) * sizeof(S) + 15) / 16 * 16;

// The first half: every block gets what this one holds. All blocks must have begun; `round` counts the joins in this
// memory, of which two may be under way.
template <class S, class Join>
__device__ inline void offer_to_cluster(S mine, Join join, S* shared, unsigned round) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = (blockDim.x + kWarp - 1) / kWarp;
  mine = over_warp(mine, join);
  if (lane == 0) shared[warp] = mine;
  __syncthreads();
  if (warp == 0) {
    mine = from_lane(over_warp(lane < warps ? shared[lane] : S{}, join), 0);
    S* of_blocks = shared + kWarp + round % 2 * kMostBlocks;
    if (lane < cluster_size()) *of_block(of_blocks + cluster_rank(), lane) = mine;
  }
  cluster_arrive();
}

// The second half: every thread gets the same bits.
template <class S, class Join>
__device__ inline S joined_over_cluster(Join join, const S* shared, unsigned round) {
  cluster_wait();
  const S* of_blocks = shared + kWarp + round % 2 * kMostBlocks;
  S all = of_blocks[0];
  for (unsigned rank = 1; rank < cluster_size(); ++rank) all = join(all, of_blocks[rank]);
  return all;
}

// Both, at any place of a kernel.
template <class S, class Join>
__device__ inline S over_cluster(S mine, Join join, S* shared) {
  cluster_sync();  // all blocks have begun, and none reads what it got before
  offer_to_cluster(mine, join, shared, 0);
  return joined_over_cluster(join, shared, 0);
}

}  // namespace mlot::cuda
