// Keys in ascending order, sorted by a cluster in device memory, and places in them.
#pragma once

#include "mlot/cuda/device.h"

namespace mlot::cuda {

constexpr unsigned kDigits = 256;
constexpr int kBitsOfDigit = 8;

// In the shared memory of each block; behind it one table [kDigits] for each of its warps.
struct SortMemory {
  unsigned of_block[kDigits], before[kDigits];
};

__host__ __device__ inline unsigned sort_bytes(unsigned threads) {
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
__device__ inline void sort_many_keys(Key* keys, Key* spare, uint32_t* columns, uint32_t* spare_columns, int n,
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

// By the one or the other.
template <class Key>
__device__ inline void sort_keys(Key* keys, Key* spare, uint32_t* columns, uint32_t* spare_columns, int n,
                                 SortMemory& memory) {
  constexpr int kFew = 512;
  if (n <= kFew) {
    sort_few_keys(keys, spare, columns, spare_columns, n);
  } else {
    sort_many_keys(keys, spare, columns, spare_columns, n, memory);
  }
}

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

}  // namespace mlot::cuda
