// How kernels are launched: on a stream of a GPU, or by cuda_on_host.h.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "mlot/cuda/device.h"

namespace mlot::cuda {

struct Shape {
  int64_t blocks;
  unsigned threads, cluster;  // blocks is a multiple of cluster
  unsigned shared_bytes;
};

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline unsigned threads_of_a_block(unsigned usual) { return usual; }

// The largest cluster up to `most` that the current device has.
inline unsigned most_in_a_cluster(unsigned most) {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  return major >= 9 ? most : 1;
}

template <class... P>
void launch(void (*kernel)(P...), const Shape& shape, void* stream, const P&... arguments) {
  if (shape.blocks == 0) return;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.blocks));
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "a kernel of mlot_kernels was not launched");
}

#else  // MLOT_ON_HOST_THREADS, MLOT_ON_HOST_CLUSTER and MLOT_ON_HOST_ORDER (0, 1, 2) choose what a test runs

inline unsigned from_environment(const char* name, unsigned otherwise) {
  const char* text = std::getenv(name);
  return text ? unsigned(std::stoul(text)) : otherwise;
}

inline unsigned threads_of_a_block(unsigned) { return from_environment("MLOT_ON_HOST_THREADS", 64); }

inline unsigned most_in_a_cluster(unsigned) { return from_environment("MLOT_ON_HOST_CLUSTER", 1); }

template <class... P>
void launch(void (*kernel)(P...), const Shape& shape, void*, const P&... arguments) {
  if (shape.blocks == 0) return;
  cuda_on_host::launch(
      dim3(unsigned(shape.blocks)), dim3(shape.threads), shape.shared_bytes, shape.cluster,
      [&] { kernel(arguments...); }, cuda_on_host::Order(from_environment("MLOT_ON_HOST_ORDER", 0)), 1);
}

#endif

// Threads and blocks for a row: as many blocks of a cluster as have two vectors for each of their threads. It depends
// on the columns alone, never on how many rows there are: it decides the order of a row's sums.
struct RowShape {
  unsigned threads, cluster;
};

inline RowShape shape_of_row(int64_t columns, int lanes) {
  constexpr unsigned kMost = 8, kVectors = 2;
  const unsigned threads = threads_of_a_block(kThreads), most = most_in_a_cluster(kMost);
#ifdef __CUDACC__
  unsigned cluster = 1;
  while (cluster < most && int64_t(2 * cluster) * threads * lanes * kVectors <= columns) cluster *= 2;
  return {threads, cluster};
#else
  (void)columns, (void)lanes, (void)kVectors;
  return {threads, most};
#endif
}

// How many blocks of `batch` vectors for each thread a row of a gradient takes, wherever it starts.
inline int64_t stretches_of(int64_t columns, int lanes, int batch) {
  const int64_t each = int64_t(threads_of_a_block(kThreads)) * batch * lanes;
  return (columns + lanes - 1 + each - 1) / each;
}

}  // namespace mlot::cuda
