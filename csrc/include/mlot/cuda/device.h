// What CUDA kernels are written in. Two compilers read them unchanged: nvcc, and a host compiler with cuda_on_host.h,
// which runs a kernel's threads one after the other so that its values are tested without a GPU.
//
// Shared memory is dynamic; 16-bit floats are storage, arithmetic is in their accumulator; what exists on a device
// alone stands behind __CUDA_ARCH__ with a plain branch beside it.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
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

__device__ inline float power_of_two(float x) { return exp2f(x); }
__device__ inline double power_of_two(double x) { return exp2(x); }
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

// How many columns of a row lie behind the last multiple of 16 bytes in front of it.
template <class T>
__device__ inline int columns_past_alignment(const T* row) {
  return int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

// Clusters of blocks. Where the chip has none, a block is its own cluster.

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ inline unsigned cluster_size() { return __clusterSizeInBlocks(); }
__device__ inline void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
template <class S>
__device__ S* of_block(S* mine, unsigned rank) {
  return static_cast<S*>(__cluster_map_shared_rank(mine, rank));
}
#else
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline unsigned cluster_size() { return 1; }
__device__ inline void cluster_sync() { __syncthreads(); }
template <class S>
__device__ S* of_block(S* mine, unsigned) {
  return mine;
}
#endif

template <class S>
__device__ inline S from_lane(S value, int exclusive) {
  static_assert(sizeof(S) % sizeof(unsigned) == 0);
  unsigned words[sizeof(S) / sizeof(unsigned)];
  memcpy(words, &value, sizeof(S));
#pragma unroll
  for (unsigned& word : words) word = __shfl_xor_sync(~0u, word, exclusive);
  memcpy(&value, words, sizeof(S));
  return value;
}

// Bytes of shared memory that `over_cluster` takes.
template <class S>
constexpr unsigned kOverCluster = (kWarp + 1) * sizeof(S);

// What all threads of a cluster hold, joined in an order of its own: that of lanes, warps and blocks. Every thread
// takes part and gets the same bits.
template <class S, class Join>
__device__ inline S over_cluster(S mine, Join join, S* shared) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes; lanes /= 2) mine = join(mine, from_lane(mine, lanes));
  const unsigned warp = threadIdx.x / kWarp, warps = (blockDim.x + kWarp - 1) / kWarp;
  if (threadIdx.x % kWarp == 0) shared[warp] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < warps; ++w) mine = join(mine, shared[w]);
    shared[kWarp] = mine;
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    mine = *of_block(shared + kWarp, 0);
    for (unsigned r = 1; r < cluster_size(); ++r) mine = join(mine, *of_block(shared + kWarp, r));
    shared[0] = mine;
  }
  __syncthreads();
  mine = shared[0];
  cluster_sync();  // nobody writes its shared memory again, or leaves, while it is read
  return mine;
}

}  // namespace mlot::cuda
