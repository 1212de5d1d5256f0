// A row of logits in descending order, sorted by a cluster in device memory.
#pragma once

#include "mlot/cuda/sorted_l1_keys.h"

namespace mlot::cuda {

constexpr unsigned kDigits = 256;
constexpr int kBitsOfDigit = 8;

// In the shared memory of each block; behind it one table [kDigits] for each of its warps.
struct SortMemory {
  unsigned of_block[kDigits], before[kDigits];
};

inline unsigned sort_bytes(unsigned threads) {
  return unsigned(sizeof(SortMemory)) + threads / kWarp * kDigits * unsigned(sizeof(unsigned));
}

// Of integers at `table` makes what all before each add up to. One warp.
__device__ inline void sum_before_each(unsigned* table) {
  constexpr unsigned kEach = kDigits / kWarp;
  const unsigned lane = threadIdx.x % kWarp;
  unsigned* const mine = table + lane * kEach;
  unsigned total = 0;
  for (unsigned i = 0; i < kEach; ++i) total += mine[i];
  unsigned before = total;
  for (unsigned lanes = 1; lanes < kWarp; lanes *= 2) {
    const unsigned more = __shfl_up_sync(~0u, before, lanes);
    if (lane >= lanes) before += more;
  }
  before -= total;
  for (unsigned i = 0; i < kEach; ++i) {
    const unsigned own = mine[i];
    mine[i] = before;
    before += own;
  }
}

// Sorts n keys, and with them their columns where these are not null, by comparing each with all others: for short
// rows, whose digits would cost one wait for the cluster after the other.
template <class Key>
__device__ inline void sort_few_keys(Key* keys, Key* spare, uint32_t* columns, uint32_t* spare_columns, int n) {
  const int first = int(cluster_rank() * blockDim.x + threadIdx.x), threads = int(cluster_size() * blockDim.x);
  cluster_sync();  // what is sorted has been written
  for (int i = first; i < n; i += threads) {
    const Key key = keys[i];
    int place = 0;
    for (int j = 0; j < n; ++j) place += keys[j] < key || (keys[j] == key && j < i);
    spare[place] = key;
    if (columns) spare_columns[place] = columns[i];
  }
  cluster_sync();
  for (int i = first; i < n; i += threads) {
    keys[i] = spare[i];
    if (columns) columns[i] = spare_columns[i];
  }
  cluster_sync();
}

// Sorts n keys, and with them their columns where these are not null, by digits from the last to the first: stable. A
// warp owns a stretch of the keys, which it reads twice for each digit, first to count and then to move, 32 at a time.
// What is sorted ends where it began: there is an even number of digits. Nothing depends on the order of atomics.
template <class Key>
__device__ inline void sort_keys(Key* keys, Key* spare, uint32_t* columns, uint32_t* spare_columns, int n,
                                 SortMemory& memory) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const unsigned rank = cluster_rank(), blocks = cluster_size();
  unsigned* const tables = reinterpret_cast<unsigned*>(&memory + 1);
  unsigned* const own = tables + warp * kDigits;
  const unsigned steps = (unsigned(n) + kWarp - 1) / kWarp, each = (steps + blocks * warps - 1) / (blocks * warps);
  const unsigned first = (rank * warps + warp) * each, last = first + each < steps ? first + each : steps;
  cluster_sync();  // what is sorted has been written
  for (int shift = 0; shift < 8 * int(sizeof(Key)); shift += kBitsOfDigit) {
    const auto digit_of = [&](Key key) { return unsigned(key >> shift) & (kDigits - 1); };
    for (unsigned i = lane; i < kDigits; i += kWarp) own[i] = 0;
    __syncwarp();
    for (unsigned step = first; step < last; ++step) {
      const unsigned i = step * kWarp + lane;
      if (i < unsigned(n)) atomicAdd(own + digit_of(keys[i]), 1u);
    }
    __syncthreads();
    for (unsigned digit = threadIdx.x; digit < kDigits; digit += blockDim.x) {
      unsigned before = 0;
      for (unsigned i = 0; i < warps; ++i) {
        const unsigned of_warp = tables[i * kDigits + digit];
        tables[i * kDigits + digit] = before;
        before += of_warp;
      }
      memory.of_block[digit] = before;
    }
    cluster_sync();
    for (unsigned digit = threadIdx.x; digit < kDigits; digit += blockDim.x) {
      unsigned all = 0, before = 0;
      for (unsigned i = 0; i < blocks; ++i) {
        const unsigned of_one = *of_block(memory.of_block + digit, i);
        before += i < rank ? of_one : 0;
        all += of_one;
      }
      memory.before[digit] = all;
      for (unsigned i = 0; i < warps; ++i) tables[i * kDigits + digit] += before;
    }
    __syncthreads();
    if (warp == 0) sum_before_each(memory.before);
    __syncthreads();
    for (unsigned i = lane; i < kDigits; i += kWarp) own[i] += memory.before[i];
    __syncwarp();
    for (unsigned step = first; step < last; ++step) {
      const unsigned i = step * kWarp + lane;
      const bool there = i < unsigned(n);
      const Key key = there ? keys[i] : Key(0);
      const unsigned digit = there ? digit_of(key) : kDigits, same = __match_any_sync(~0u, digit);
      const unsigned earlier = unsigned(__popc(same & ((1u << lane) - 1)));
      if (there) {
        const unsigned place = own[digit] + earlier;
        spare[place] = key;
        if (columns) spare_columns[place] = columns[i];
      }
      __syncwarp();
      if (there && earlier == 0) own[digit] += unsigned(__popc(same));
      __syncwarp();
    }
    cluster_sync();
    Key* const moved = spare;
    spare = keys, keys = moved;
    uint32_t* const moved_columns = spare_columns;
    spare_columns = columns, columns = moved_columns;
  }
}

// Some logits of a row that are equal: ranks [first, last) of it.
template <class A>
struct Run {
  A x;
  int first, last;
};

// How many of a row's probabilities are larger than one of the other row, and how many are no smaller.
struct Met {
  int larger = 0, no_smaller = 0;
};

// The first place from `low` on where `holds`, which holds at places up to some one, does not. What is near is found in
// fewer steps.
template <class Holds>
__device__ inline int first_without(int low, int n, Holds holds) {
  unsigned begin = unsigned(low), step = 1;
  const unsigned end = unsigned(n);
  while (begin + step <= end && holds(int(begin + step - 1))) begin += step, step *= 2;
  unsigned high = begin + step - 1 < end ? begin + step - 1 : end;
  while (begin < high) {
    const unsigned middle = (begin + high) / 2;
    if (holds(int(middle))) {
      begin = middle + 1;
    } else {
      high = middle;
    }
  }
  return int(begin);
}

// A row in order: its keys, those of -inf and of columns that are not looked at behind the `listed` others.
template <class T>
struct SortedRow {
  using A = Accumulator<T>;
  using Element = T;
  const DescendingKey<T>* keys;
  int listed;
  Likelihood<A> law;

  __device__ int end_of_run(int i) const {
    const auto key = keys[i];
    return first_without(i, listed, [&](int j) { return keys[j] == key; });
  }
  __device__ int start_of_run(int i) const {
    const auto key = keys[i];
    return first_without(0, i, [&](int j) { return keys[j] < key; });
  }

  // Of items, here ranks: the first one from i on with which a run begins, and the run that begins with i.
  __device__ int first_run_from(int i) const {
    return i == 0 || i >= listed || keys[i - 1] != keys[i] ? i : end_of_run(i);
  }
  __device__ Run<A> run(int i, int& next) const {
    next = end_of_run(i);
    return {logit_of<T>(keys[i]), i, next};
  }

  // Of a probability's log2, from what a larger one met.
  template <class W>
  __device__ Met meet(W t, Met before) const {
    const auto log2_p = [&](int i) { return W(law.log2_p(logit_of<T>(keys[i]))); };
    Met met;
    met.larger = first_without(before.larger, listed, [&](int i) { return log2_p(i) > t; });
    met.no_smaller = first_without(before.no_smaller > met.larger ? before.no_smaller : met.larger, listed,
                                   [&](int i) { return log2_p(i) >= t; });
    return met;
  }
};

// Reads a row once and sorts it, and its columns with it if these are not null; the cluster's threads get how many
// logits are listed. `joins` has room for kJoin<unsigned>.
template <class T>
__device__ inline int sort_row(const T* row, const LogitsRows& rows, DescendingKey<T>* keys, DescendingKey<T>* spare,
                               uint32_t* columns, uint32_t* spare_columns, SortMemory& memory, void* joins) {
  using A = Accumulator<T>;
  unsigned mine = 0;
  for_vectors<2>(row, rows.vocab_size, [&](int64_t first, int64_t step, const A(&x)[2][kLanes<T>]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        const int64_t column = first + i * step + lane;
        if (column >= rows.vocab_size) continue;
        const A own = rows.column_mask && !rows.column_mask[column] ? A(-INFINITY) : x[i][lane];
        keys[column] = descending_key<T>(own);
        if (columns) columns[column] = uint32_t(column);
        mine += own != A(-INFINITY);
      }
    }
  });
  constexpr int kFew = 512;
  const int n = int(rows.vocab_size);
  if (n <= kFew) {
    sort_few_keys(keys, spare, columns, spare_columns, n);
  } else {
    sort_keys(keys, spare, columns, spare_columns, n, memory);
  }
  return int(over_cluster(mine, [](unsigned a, unsigned b) { return a + b; }, static_cast<unsigned*>(joins)));
}

}  // namespace mlot::cuda
