// Log-sum-exp of every row, a cluster of blocks per row: the smallest kernel that uses asynchronous copies, a block
// reduction, a cluster barrier and distributed shared memory. Compiled unchanged by nvcc and by g++.
#ifdef __CUDACC__
#include <cuda_pipeline_primitives.h>
#define DYNAMIC_SHARED(T, name)                                 \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  T* name = reinterpret_cast<T*>(name##_bytes)
#else
#include "cuda_on_host.h"
#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(cuda_on_host::shared_memory())
#endif

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // clusters: Hopper and later; elsewhere a block is its own cluster
__device__ inline unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ inline unsigned cluster_size() { return __clusterSizeInBlocks(); }
__device__ inline void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
template <class T>
__device__ T* of_block(T* mine, unsigned rank) {
  return static_cast<T*>(__cluster_map_shared_rank(mine, rank));
}
#else
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline unsigned cluster_size() { return 1; }
__device__ inline void cluster_sync() { __syncthreads(); }
template <class T>
__device__ T* of_block(T* mine, unsigned) {
  return mine;
}
#endif

struct Partial {
  float peak, total;
};

__device__ inline Partial join(Partial a, Partial b) {
  if (a.total == 0) return b;
  if (b.total == 0) return a;
  float peak = fmaxf(a.peak, b.peak);
  return {peak, a.total * exp2f(a.peak - peak) + b.total * exp2f(b.peak - peak)};
}

// One cluster owns one row; its blocks take tiles of blockDim.x columns in turn. Writes lse[row], in nats.
__global__ void row_lse(const float* logits, float* lse, int columns) {
  constexpr float kLog2e = 1.44269504f;
  DYNAMIC_SHARED(Partial, warps);                      // [32] of the warps, [1] of the block
  float* tile = reinterpret_cast<float*>(warps + 33);  // [blockDim.x]
  const unsigned rank = cluster_rank(), blocks = cluster_size();
  const float* row = logits + size_t(blockIdx.x / blocks) * columns;

  Partial mine{0, 0};
  for (int first = rank * blockDim.x; first < columns; first += blocks * blockDim.x) {
    const bool inside = first + int(threadIdx.x) < columns;
    if (inside) __pipeline_memcpy_async(tile + threadIdx.x, row + first + threadIdx.x, sizeof(float));
    __pipeline_commit();
    __pipeline_wait_prior(0);
    if (inside) mine = join(mine, {tile[threadIdx.x] * kLog2e, 1});
  }
  for (int x = 16; x; x >>= 1)
    mine = join(mine, {__shfl_xor_sync(~0u, mine.peak, x), __shfl_xor_sync(~0u, mine.total, x)});
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
#ifndef DROP_A_BARRIER
  __syncthreads();
#endif
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / 32; ++w) mine = join(mine, warps[w]);
    warps[32] = mine;
  }
  cluster_sync();
  if (rank == 0 && threadIdx.x == 0) {
    for (unsigned r = 1; r < blocks; ++r) mine = join(mine, *of_block(&warps[32], r));
    lse[blockIdx.x / blocks] = (mine.peak + log2f(mine.total)) / kLog2e;
  }
  cluster_sync();  // nobody leaves while its shared memory is read
}

#ifndef __CUDACC__
#include <cstdio>
int main() {
  using namespace cuda_on_host;
  constexpr int rows = 3, columns = 1000;
  std::vector<float> x(rows * columns), y(rows);
  std::mt19937 random(0);
  for (auto& v : x) v = float(random() % 2000) / 100 - 10;
  bool good = true;
  for (unsigned threads : {32u, 128u})
    for (unsigned blocks : {1u, 4u})
      for (Order order : {Order::ascending, Order::descending, Order::shuffled}) {
        size_t bytes = 33 * sizeof(Partial) + threads * sizeof(float);
        launch(
            dim3(rows * blocks), dim3(threads), bytes, blocks, [&] { row_lse(x.data(), y.data(), columns); }, order, 1);
        for (int r = 0; r < rows; ++r) {
          double total = 0;
          for (int j = 0; j < columns; ++j) total += std::exp(double(x[r * columns + j]));
          good &= std::abs(y[r] - std::log(total)) < 1e-5;
        }
      }
  std::vector<int> seen(64);  // shuffles and votes over part of a warp, then over all of it
  launch(
      dim3(1), dim3(64), 0, 1,
      [&] {
        int lane = threadIdx.x % 32, v = int(threadIdx.x);
        if (lane < 16) v = __shfl_xor_sync(0xffffu, v, 1);
        v = __shfl_xor_sync(~0u, v, 16);
        seen[threadIdx.x] = v + 1000 * __popc(__ballot_sync(~0u, lane < 5));
      },
      Order::shuffled, 7);
  for (int i = 0; i < 64; ++i) good &= seen[i] == 5000 + (i % 32 < 16 ? i + 16 : (i - 16) ^ 1);
  auto fails = [&](std::function<void()> body) {
    try {
      launch(dim3(2), dim3(64), 0, 2, body);
    } catch (const std::exception& e) {
      std::printf("caught: %s\n", e.what());
      return;
    }
    good = false;
  };
  fails([] {
    if (threadIdx.x < 32)
      __syncthreads();
    else
      __syncwarp(), __syncwarp(), cluster_sync();
  });
  fails([] { __cluster_barrier_wait(); });
  std::puts(good ? "ok" : "WRONG");
  return !good;
}
#endif
