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

inline unsigned bins_for_any_row() { return 0; }

inline int of_device(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// The largest cluster that the current device has.
inline unsigned most_in_a_cluster() { return of_device(cudaDevAttrComputeCapabilityMajor) >= 9 ? kMostBlocks : 1; }

// Bytes of shared memory that a block may ask for.
inline unsigned most_shared_bytes() { return unsigned(of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }

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
  constexpr unsigned kUnasked = 48 << 10;  // what a block may have without a word
  if (shape.shared_bytes > kUnasked) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes)),
          "cudaFuncSetAttribute");
  }
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "a kernel of mlot_kernels was not launched");
}

#else  // MLOT_ON_HOST_THREADS, _CLUSTER, _SHARED (bytes), _BINS and _ORDER (0, 1, 2) choose what a test runs

inline unsigned from_environment(const char* name, unsigned otherwise) {
  const char* text = std::getenv(name);
  return text ? unsigned(std::stoul(text)) : otherwise;
}

inline unsigned threads_of_a_block(unsigned) { return from_environment("MLOT_ON_HOST_THREADS", 64); }

// Where it is not 0, rows of any length go into so many bins, and few logits fit into open ones (sorted_l1).
inline unsigned bins_for_any_row() { return from_environment("MLOT_ON_HOST_BINS", 0); }

inline unsigned most_in_a_cluster() { return from_environment("MLOT_ON_HOST_CLUSTER", 1); }

inline unsigned most_shared_bytes() { return from_environment("MLOT_ON_HOST_SHARED", 227 << 10); }

template <class... P>
void launch(void (*kernel)(P...), const Shape& shape, void*, const P&... arguments) {
  if (shape.blocks == 0) return;
  cuda_on_host::launch(
      dim3(unsigned(shape.blocks)), dim3(shape.threads), shape.shared_bytes, shape.cluster,
      [&] { kernel(arguments...); }, cuda_on_host::Order(from_environment("MLOT_ON_HOST_ORDER", 0)), 1);
}

#endif

// How many pieces of `size` cover n.
constexpr int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Threads and blocks for a row: as many blocks of a cluster as have two vectors for each of their threads. It depends
// on the columns alone, never on how many rows there are: it decides the order of a row's sums.
struct RowShape {
  unsigned threads, cluster;
};

inline RowShape shape_of_row(int64_t columns, int lanes, unsigned usual_threads = kThreads) {
  constexpr unsigned kVectors = 2;
  const unsigned threads = threads_of_a_block(usual_threads), most = most_in_a_cluster();
#ifdef __CUDACC__
  unsigned cluster = 1;
  while (cluster < most && int64_t(2 * cluster) * threads * lanes * kVectors <= columns) cluster *= 2;
  return {threads, cluster};
#else
  (void)columns, (void)lanes, (void)kVectors;
  return {threads, most};
#endif
}

}  // namespace mlot::cuda
