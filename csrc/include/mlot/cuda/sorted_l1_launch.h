// When and how sorted_l1's clusters are launched.
#pragma once

#include "mlot/cuda/launch.h"
#include "mlot/cuda/sorted_l1.h"
#include "mlot/cuda/sorted_l1_binned.h"

namespace mlot::cuda {

constexpr unsigned kPairThreads = 512;  // of a block that owns a part of a pair of rows

__host__ __device__ inline int64_t longer(const LogitsRows& one, const LogitsRows& other) {
  return one.vocab_size > other.vocab_size ? one.vocab_size : other.vocab_size;
}

constexpr int64_t kCountedFrom = 2048;  // columns: shorter rows are sorted in less than a look through the counters

// Whether the rows of pairs of 16 bits are counted: where the cluster's shared memory holds the counters.
inline bool are_counted(const LogitsRows& one, const LogitsRows& other) {
  const unsigned blocks = most_in_a_cluster();
  return one.vocab_size >= kCountedFrom && other.vocab_size >= kCountedFrom && blocks >= kFewestCountingBlocks &&
         kPairJoin<float> + CountMemory::bytes(blocks) <= most_shared_bytes();
}

// A cluster for each pair.
inline Shape counting_shape(const LogitsRows& rows) {
  const unsigned blocks = most_in_a_cluster();
  return {rows.all_slots() * blocks, threads_of_a_block(kPairThreads), blocks,
          kPairJoin<float> + CountMemory::bytes(blocks)};
}

// A cluster for each place of the room, which sorts one pair after the other.
template <class A>
Shape sorting_shape(const LogitsRows& one, const LogitsRows& other, const SortRoom& room) {
  const RowShape row = shape_of_row(longer(one, other), kLanes<float>, kPairThreads);
  return {room.clusters * row.cluster, row.threads, row.cluster, kPairJoin<A> + sort_bytes(row.threads)};
}

// The room that rows in bins are joined in.
constexpr unsigned kBinJoin = kPairJoin<double>;
static_assert(kBinJoin >= kJoin<ClosedSums> && kBinJoin >= kJoin<Opened> && kBinJoin >= kJoin<Extent<double>>);

// How a pair is put into bins: a cluster for each.
struct Binning {
  BinSizes sizes;
  Shape shape;
  bool pays;  // else it is sorted
};

// As many bins as a block's shared memory holds, but no more than the longer row has columns; `logit` bytes are the
// larger one of the two rows'. They depend on the rows' lengths and the chip alone.
inline Binning binning_of(const LogitsRows& one, const LogitsRows& other, unsigned logit) {
  constexpr int64_t kBinnedFrom = 2048;  // columns: shorter rows are sorted in less than a look through the bins
  constexpr unsigned kMostBins = 8192, kFewestBins = 1024, kFewestOpen = 512;
  const unsigned forced = bins_for_any_row(), most = most_shared_bytes();
  const RowShape row = shape_of_row(longer(one, other), kLanes<float>, kPairThreads);
  Binning made{{}, {one.all_slots() * row.cluster, row.threads, row.cluster, 0}, false};
  const bool is_short = one.vocab_size < kBinnedFrom || other.vocab_size < kBinnedFrom;
  if (is_short && !forced) return made;
  for (unsigned bins = forced ? forced : kMostBins; bins >= (forced ? forced : kFewestBins); bins /= 2) {
    const unsigned fixed = kBinJoin + BinMemory::bytes_of_tables(bins) + sort_bytes(row.threads);
    if (!forced && (bins > longer(one, other) || fixed > most)) continue;
    unsigned open = forced ? forced : (most - fixed) / (BinMemory::lists_of_block(row.cluster) * logit) / 16 * 16;
    if (open > kMostOpen) open = kMostOpen;
    made.sizes = {bins, open};
    made.shape.shared_bytes = fixed + BinMemory::bytes_of_area(made.sizes, row.cluster, logit);
    made.pays = open >= (forced ? 1 : kFewestOpen) && made.shape.shared_bytes <= most;
    if (made.pays) break;
  }
  return made;
}

// Of the cluster that a block belongs to.
__device__ inline int64_t cluster_number() { return blockIdx.x / cluster_size(); }
__device__ inline int64_t clusters_of_grid() { return gridDim.x / cluster_size(); }

template <class T>
__device__ inline T* of_room(const SortRoom& room, int64_t offset) {
  return reinterpret_cast<T*>(room.memory + cluster_number() * room.each + offset);
}

}  // namespace mlot::cuda
