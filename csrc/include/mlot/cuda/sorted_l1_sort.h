// A row of logits in descending order, sorted by a cluster in device memory.
#pragma once

#include "mlot/cuda/sort_keys.h"
#include "mlot/cuda/sorted_l1_keys.h"

namespace mlot::cuda {

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
  sort_keys(keys, spare, columns, spare_columns, int(rows.vocab_size), memory);
  return int(over_cluster(mine, [](unsigned a, unsigned b) { return a + b; }, static_cast<unsigned*>(joins)));
}

}  // namespace mlot::cuda
