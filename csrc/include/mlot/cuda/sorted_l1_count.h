// A row of 16-bit logits in descending order, counted by value in the shared memory of a cluster.
#pragma once

#include <type_traits>

#include "mlot/cuda/scan.h"
#include "mlot/cuda/sorted_l1_sort.h"

namespace mlot::cuda {

constexpr unsigned kValues = 1 << 16;                 // of a key
constexpr unsigned kMostListed = kValues - (1 << 8);  // all but NaN: so many in bfloat16, in float16 fewer
constexpr unsigned kGroup = kWarp, kGroups = kValues / kGroup;

// An array in the shared memory of all blocks, in turns of 32 elements: neighbouring values are those that occur, and
// no block is to have them all. There are as many blocks as a power of two.
template <class E>
struct Spread {
  E* mine;
  unsigned shift;  // log2 of the blocks

  __device__ E* at(unsigned i) const {
    const unsigned turn = i / kGroup;
    return of_block(mine + ((turn >> shift) * kGroup + i % kGroup), turn & ((1u << shift) - 1));
  }
};

// The bfloat16 that most logits are, 2^-7 to 2^5 and their negatives: each block counts these for itself before it adds
// to the cluster's counters, for they are few and its own shared memory is near. float16 has eight times as many.
struct Window {
  static constexpr unsigned kFirst = 120 << 7, kMagnitudes = 12 << 7, kSize = 2 * kMagnitudes;

  // Not below kSize where the key is none of these.
  __device__ static unsigned place(unsigned key) {
    const unsigned negative = key >> 15, magnitude = (negative ? key : ~key) & 0x7fff;
    return magnitude - kFirst < kMagnitudes ? magnitude - kFirst + negative * kMagnitudes : kSize;
  }
  __device__ static unsigned key(unsigned place) {
    const bool negative = place >= kMagnitudes;
    const unsigned magnitude = place - (negative ? kMagnitudes : 0) + kFirst;
    return negative ? magnitude | 0x8000 : magnitude ^ 0x7fff;
  }
};

// How many logits, and how many values that occur, come before.
struct Before {
  unsigned logits, values;
};

// Where a cluster of a power of two of blocks counts the rows of a pair, in the shared memory of each block. The window
// lies where the list comes to be.
struct CountMemory {
  unsigned* counts[2];
  uint16_t* list[2];
  Before* groups;

  __host__ __device__ static constexpr unsigned bytes(unsigned blocks) {
    return (2 * kValues * unsigned(sizeof(unsigned)) + 2 * kMostListed * unsigned(sizeof(uint16_t)) +
            kGroups * unsigned(sizeof(Before))) /
           blocks;
  }

  __device__ explicit CountMemory(unsigned char* at) {
    const unsigned blocks = cluster_size();
    for (auto& table : counts) table = reinterpret_cast<unsigned*>(at), at += kValues / blocks * sizeof(unsigned);
    for (auto& table : list) table = reinterpret_cast<uint16_t*>(at), at += kMostListed / blocks * sizeof(uint16_t);
    groups = reinterpret_cast<Before*>(at);
  }
};
constexpr unsigned kFewestCountingBlocks = 4;
static_assert(Window::kSize * sizeof(unsigned) <= kMostListed / kMostBlocks * sizeof(uint16_t));
static_assert(kMostListed % (kGroup * kMostBlocks) == 0);

// A row in order: the values that occur, and for every value how many logits are no smaller.
template <class T>
struct CountedRow {
  using A = Accumulator<T>;
  using Element = T;
  Spread<unsigned> counts;
  Spread<uint16_t> list;
  int listed;
  Likelihood<A> law;

  // Of items, here values that occur.
  __device__ int first_run_from(int i) const { return i; }
  __device__ Run<A> run(int i, int& next) const {
    next = i + 1;
    const unsigned key = *list.at(unsigned(i));
    return {logit_of<T>(uint16_t(key)), int(*counts.at(key - 1)), int(*counts.at(key))};
  }

  // The first finite value whose log2 p does not `hold`, or the one behind them. It is not 0.
  template <class Holds>
  __device__ unsigned first_value_without(Holds holds) const {
    constexpr unsigned kInfinity = std::is_same_v<T, bfloat16> ? 0x7f80 : 0x7c00;
    unsigned low = (kInfinity ^ 0x7fff) + 1, high = kInfinity | 0x8000;
    while (low < high) {
      const unsigned middle = (low + high) / 2;
      if (holds(law.log2_p(logit_of<T>(uint16_t(middle))))) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Of a probability's log2. Values are not read but made.
  template <class W>
  __device__ Met meet(W t, Met) const {
    const unsigned larger = first_value_without([&](A log2_p) { return W(log2_p) > t; });
    Met met;
    met.larger = met.no_smaller = int(*counts.at(larger - 1));
    if (W(law.log2_p(logit_of<T>(uint16_t(larger)))) == t) {
      met.no_smaller = int(*counts.at(first_value_without([&](A log2_p) { return W(log2_p) >= t; }) - 1));
    }
    return met;
  }
};

// Reads a row once and counts it into table `side` of the cluster's memory; returns how many values occur. All counts
// are integers, whose sums do not depend on the order of atomics. `joins` has room for kJoin<Before>.
template <class T>
__device__ inline CountedRow<T> count_row(const T* row, const LogitsRows& rows, const Likelihood<Accumulator<T>>& law,
                                          const CountMemory& memory, int side, void* joins) {
  using A = Accumulator<T>;
  constexpr bool kHasWindow = std::is_same_v<T, bfloat16>;
  const unsigned shift = unsigned(__ffs(int(cluster_size()))) - 1;
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const Spread<unsigned> counts{memory.counts[side], shift};
  const Spread<uint16_t> list{memory.list[side], shift};
  unsigned* const window = reinterpret_cast<unsigned*>(list.mine);
  for (unsigned i = threadIdx.x; i < kValues >> shift; i += blockDim.x) counts.mine[i] = 0;
  if constexpr (kHasWindow) {
    for (unsigned i = threadIdx.x; i < Window::kSize; i += blockDim.x) window[i] = 0;
  }
  cluster_sync();
  for_vectors<2>(row, rows.vocab_size, [&](int64_t first, int64_t step, const A(&x)[2][kLanes<T>]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kLanes<T>; ++j) {
        const int64_t column = first + i * step + j;  // -inf behind the row
        // NaN, which -inf is not below either, shows in the row's scalars.
        if (!(x[i][j] > A(-INFINITY)) || (rows.column_mask && !rows.column_mask[column])) continue;
        const unsigned key = descending_key<T>(x[i][j]), place = kHasWindow ? Window::place(key) : Window::kSize;
        atomicAdd(place < Window::kSize ? window + place : counts.at(key), 1u);
      }
    }
  });
  if constexpr (kHasWindow) {
    __syncthreads();
    for (unsigned i = threadIdx.x; i < Window::kSize; i += blockDim.x) {
      if (window[i] > 0) atomicAdd(counts.at(Window::key(i)), window[i]);
    }
  }
  cluster_sync();

  // What comes before each group of 32 values. Group g is number g / blocks of block g % blocks.
  const unsigned own_groups = kGroups >> shift;
  for (unsigned i = warp; i < own_groups; i += warps) {
    const unsigned count = counts.mine[i * kGroup + lane], all = __reduce_add_sync(~0u, count);
    const unsigned values = unsigned(__popc(__ballot_sync(~0u, count > 0)));
    if (lane == 0) memory.groups[i] = {all, values};
  }
  cluster_sync();
  const auto group = [&](unsigned i) { return of_block(memory.groups + (i >> shift), i & ((1u << shift) - 1)); };
  const unsigned threads = cluster_size() * blockDim.x, each = (kGroups + threads - 1) / threads;
  const unsigned begin = (cluster_rank() * blockDim.x + threadIdx.x) * each;
  const auto add = [](Before a, Before b) { return Before{a.logits + b.logits, a.values + b.values}; };
  Before mine{};
  for (unsigned i = begin; i < begin + each && i < kGroups; ++i) mine = add(mine, *group(i));
  const auto scanned = scan_over_cluster(mine, add, static_cast<Before*>(joins));
  Before running = scanned.before;
  for (unsigned i = begin; i < begin + each && i < kGroups; ++i) {
    Before* const place = group(i);
    const Before own = *place;
    *place = running;
    running = add(running, own);
  }
  cluster_sync();

  for (unsigned i = warp; i < own_groups; i += warps) {
    const unsigned count = counts.mine[i * kGroup + lane], occur = __ballot_sync(~0u, count > 0);
    const Before before = memory.groups[i];
    unsigned up_to = count;
    if (occur) {
#pragma unroll
      for (unsigned lanes = 1; lanes < kWarp; lanes *= 2) {
        const unsigned more = __shfl_up_sync(~0u, up_to, lanes);
        if (lane >= lanes) up_to += more;
      }
    }
    counts.mine[i * kGroup + lane] = before.logits + up_to;
    const unsigned place = before.values + unsigned(__popc(occur & ((1u << lane) - 1)));
    if (count > 0) *list.at(place) = uint16_t(((i << shift) + cluster_rank()) * kGroup + lane);
  }
  cluster_sync();
  return {counts, list, int(scanned.all.values), law};
}

}  // namespace mlot::cuda
