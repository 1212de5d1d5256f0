// What the design of the CUDA kernels rests on: how long the barrier of a thread-block cluster takes, and a join of one
// value over the cluster, for 1 to 16 blocks. Prints a line of JSON for each; exit status 2 where the GPU has no
// clusters.
//
//     nvcc -std=c++17 -O3 -arch=native -Icsrc/include bench/cluster_barrier.cu -o cluster_barrier && ./cluster_barrier
#include <cstdio>

#include "mlot/cuda/launch.h"

namespace {

using namespace mlot::cuda;

constexpr int kRounds = 2000;
constexpr unsigned kMeasuredThreads = 512;  // of column_sums.cu, whose rows wait for such a join

__device__ inline long long nanoseconds() {
  long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Every cluster passes kRounds barriers; block 0 writes how long they took.
__global__ void barriers(long long* took) {
  cluster_sync();
  const long long start = nanoseconds();
  for (int round = 0; round < kRounds; ++round) cluster_sync();
  if (blockIdx.x == 0 && threadIdx.x == 0) *took = nanoseconds() - start;
}

// The same of joins, each of which needs the one before.
__global__ void joins(long long* took, float* out) {
  MLOT_SHARED_MEMORY(float, shared);
  cluster_sync();
  const auto add = [](float a, float b) { return a + b; };
  const long long start = nanoseconds();
  float sum = 1;
  for (int round = 0; round < kRounds; ++round) {
    offer_to_cluster(sum * 1e-6f, add, shared, unsigned(round));
    sum = joined_over_cluster(add, shared, unsigned(round));
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *took = nanoseconds() - start, *out = sum;
  cluster_sync();  // nobody reads the memory of a block that has ended
}

}  // namespace

int main() {
  try {
    if (of_device(cudaDevAttrComputeCapabilityMajor) < 9) {
      std::fprintf(stderr, "this GPU has no thread-block clusters: they need sm_90 or newer\n");
      return 2;
    }
    check(cudaFuncSetAttribute(barriers, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute");
    long long* took = nullptr;
    float* out = nullptr;
    check(cudaMallocManaged(&took, sizeof(*took)), "cudaMallocManaged");
    check(cudaMallocManaged(&out, sizeof(*out)), "cudaMallocManaged");
    for (unsigned blocks = 1; blocks <= 16; blocks *= 2) {
      const Shape shape{128 / blocks * blocks, kMeasuredThreads, blocks, kJoin<float>};
      double of_barrier = 0, of_join = 0;
      for (int i = 0; i < 2; ++i) {  // the first time warms up
        launch(barriers, shape, nullptr, took);
        check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
        of_barrier = double(*took) / kRounds;
        if (blocks > kMostBlocks) continue;  // a join has room for no more
        launch(joins, shape, nullptr, took, out);
        check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
        of_join = double(*took) / kRounds;
      }
      std::printf("{\"blocks\": %u, \"barrier_ns\": %.1f, \"join_ns\": %.1f}\n", blocks, of_barrier, of_join);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
