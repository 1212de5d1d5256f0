// What the threads of a cluster that come before each one hold, joined.
#pragma once

#include "mlot/cuda/device.h"

namespace mlot::cuda {

template <class S>
struct Scanned {
  S before;  // of the threads before this one, by block and thread
  S all;
};

// Joins in the order of threads, so that `join` need not commute; S{} changes nothing that it is joined with. `shared`
// has room for kJoin<S>, 16-byte aligned. At any place of a kernel.
template <class S, class Join>
__device__ inline Scanned<S> scan_over_cluster(S mine, Join join, S* shared) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  S up_to = mine;
#pragma unroll
  for (unsigned lanes = 1; lanes < kWarp; lanes *= 2) {
    const S other = from_lane(up_to, int(lane >= lanes ? lane - lanes : lane));
    if (lane >= lanes) up_to = join(other, up_to);
  }
  Scanned<S> made{from_lane(up_to, int(lane == 0 ? 0 : lane - 1)), S{}};
  if (lane == 0) made.before = S{};
  cluster_sync();  // all blocks have begun, and none reads what it got before
  if (lane == kWarp - 1) shared[warp] = up_to;
  __syncthreads();
  S in_block{};
  for (unsigned i = 0; i < warps; ++i) {
    if (i == warp) made.before = join(in_block, made.before);
    in_block = join(in_block, shared[i]);
  }
  S* const of_blocks = shared + kWarp;
  if (threadIdx.x < cluster_size()) *of_block(of_blocks + cluster_rank(), threadIdx.x) = in_block;
  cluster_sync();
  for (unsigned rank = 0; rank < cluster_size(); ++rank) {
    if (rank == cluster_rank()) made.before = join(made.all, made.before);
    made.all = join(made.all, of_blocks[rank]);
  }
  return made;
}

}  // namespace mlot::cuda
