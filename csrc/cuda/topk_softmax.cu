// topk_softmax on a GPU: a cluster of blocks owns a row, makes its scalars and, of the same read, the largest key of
// each group of columns. k groups reach the k-th largest of these: nearly all columns that do are in the result.
#include "mlot/cuda/topk_softmax.h"

#include "mlot/cuda/largest.h"
#include "mlot/cuda/launch.h"
#include "mlot/cuda/row_statistics.h"

namespace mlot::cuda {
inline namespace topk_softmax_kernels {

constexpr int kBatch = kStatisticsBatch;
constexpr unsigned kCandidateBytes = 16 << 10;

template <class T>
constexpr int64_t kGroup = kWarp * kLanes<T>;  // columns: what a warp reads at once

template <class A>
struct TopkMemory {
  static constexpr unsigned kMost = kCandidateBytes / sizeof(Order<A>);
  alignas(16) unsigned char scalars[kStatisticsBytes<A, 1>];
  DigitMemory digits;
  unsigned count;              // of candidates, whether or not they had room; of the first block
  Order<A> candidates[kMost];  // of the cluster; in the first block
};

__device__ inline uint32_t largest_of_warp(uint32_t key) { return __reduce_max_sync(~0u, key); }
__device__ inline uint64_t largest_of_warp(uint64_t key) {
  return over_warp(key, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}

template <class T, class A = Accumulator<T>>
struct TopkRow {
  const TopkSoftmaxForward& call;
  const T* row;
  int64_t slot;
  A peak, scaled, log_total, log_scale;

  // One lane of a warp, or a thread for itself.
  __device__ void write(int64_t place, int64_t column) const {
    A log_p = (widen(row[column]) - peak) / scaled - log_total + log_scale;
    if (call.rows.column_mask && !call.rows.column_mask[column] && log_p == log_p) log_p = -INFINITY;
    put<A>(call.log_probabilities, slot * call.k + place, log_p);
    call.columns[slot * call.k + place] = column;
  }
};

// Owns one slot with a cluster: reads its row once (standardized twice), then the groups whose largest key reaches the
// k-th largest of these, up to its first two digits; writes its k columns, their log-probabilities and what backward
// needs. Where there are fewer groups than k, or no room for all that reach it (many are equal), it reads the row once
// for each digit of the k-th largest column. `block_groups`: of one block, 0
// where shared memory does not hold them.
template <class T, bool kStandardize, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3)
    forward(TopkSoftmaxForward call, int64_t block_groups) {
  MLOT_SHARED_MEMORY(TopkMemory<A>, shared);
  TopkMemory<A>& memory = *shared;
  Key<A>* const groups = reinterpret_cast<Key<A>*>(shared + 1);  // [iterations, kBatch, warps]
  const LogitsRows& rows = call.rows;
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t slot = blockIdx.x / cluster_size(), end = rows.vocab_size, step = int64_t(blockDim.x) * kLanes<T>;
  const int64_t first_thread = int64_t(cluster_rank()) * blockDim.x + threadIdx.x;
  const int64_t all_threads = int64_t(cluster_size()) * blockDim.x;
  const T* row = row_of<T>(rows, slot);
  if (!row) {
    for (int64_t i = first_thread; i < call.k; i += all_threads) {
      put<A>(call.log_probabilities, slot * call.k + i, 0);
      call.columns[slot * call.k + i] = 0;
    }
    if (first_thread != 0) return;
    save(call.saved, slot, Scale<A>{0, 0, 0, 0});
    put<A>(call.saved.log_total, slot, 0);
    put<A>(call.saved.expected, slot, 0);
    put<A>(call.lse, slot, 0);
    return;
  }
  const ColumnOrder<T> order{rows.column_mask, end};
  if (threadIdx.x == 0) memory.count = 0;
  Key<A>* mine = groups + warp;
  const auto keep_largest = [&](int64_t first, int64_t step, const A(&x)[kBatch][kLanes<T>]) {
    if (block_groups == 0) return;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      Key<A> key = 0;
#pragma unroll
      for (int j = 0; j < kLanes<T>; ++j) {
        const int64_t column = first + i * step + j;
        const Key<A> of_one = column < end ? order.key(x[i][j], column) : 0;
        key = of_one > key ? of_one : key;
      }
      key = largest_of_warp(key);
      if (lane == 0) *mine = key;
      mine += warps;
    }
  };
  const auto made = statistics<kStandardize, 1>(row, rows, rows.temperature, memory.scalars, keep_largest);
  const TopkRow<T> out{call,
                       row,
                       slot,
                       made.scale.peak,
                       A(rows.temperature) * made.scale.scale,
                       A(made.log_total[0]),
                       at<A>(rows.log_scale, slot)};
  if (first_thread == 0) {
    save(call.saved, slot, made.scale);
    put<A>(call.saved.log_total, slot, made.log_total[0]);
    put<A>(call.saved.expected, slot, made.expected[0]);
    put<A>(call.lse, slot, out.peak / out.scaled + out.log_total);
  }

  if (block_groups != 0 && call.k * kGroup<T> <= end) {
    const int64_t written = mine - groups;  // at this warp's next place: the first that it did not write
    const auto cut = cut_at<Key<A>>(
        memory.digits, unsigned(call.k), ColumnOrder<T>::kTop - kColumnBits,
        [](int shift) { return shift == ColumnOrder<T>::kTop - kColumnBits ? shift - kDigitBits : -1; },
        [&](auto use) {
          for (int64_t i = warp + int64_t(lane) * warps; i < written; i += int64_t(kWarp) * warps) use(groups[i]);
        });
    for (int64_t i = warp, number = 0; i < written; i += warps, ++number) {
      if (!cut.reached_by(groups[i])) continue;
      const int64_t turn = number / kBatch * cluster_size() + cluster_rank();
      const int64_t first = (turn * kBatch + number % kBatch) * step + threadIdx.x * kLanes<T>;
      A x[kLanes<T>];
      load(row, first, end, A(-INFINITY), x);
#pragma unroll
      for (int j = 0; j < kLanes<T>; ++j) {
        const bool is_one = first + j < end && cut.reached_by(order.key(x[j], first + j));
        const unsigned all = __ballot_sync(~0u, is_one);
        if (all == 0) continue;
        unsigned place = 0;
        if (lane == 0) place = atomicAdd(of_block(&memory.count, 0), unsigned(__popc(all)));
        place = __shfl_sync(~0u, place, 0) + __popc(all & ((1u << lane) - 1));
        if (is_one && place < memory.kMost) {
          of_block(memory.candidates, 0)[place] = order.order(x[j], first + j);
        }
      }
    }
    cluster_sync();
    const unsigned count = *of_block(&memory.count, 0);
    cluster_sync();  // all have read it
    if (count <= memory.kMost) {
      if (cluster_rank() != 0) return;
      for (unsigned i = warp; i < count; i += warps) {
        const unsigned place = place_among(memory.candidates, count, memory.candidates[i]);
        if (place < call.k && lane == 0) out.write(place, order.column(memory.candidates[i]));
      }
      return;
    }
  }

  Order<A>* const found = static_cast<Order<A>*>(call.found) + slot * call.k;
  collect_largest(memory.digits, &memory.count, order, call.k, found, [&](auto use) {
    for_vectors<kBatch>(row, end, [&](int64_t first, int64_t step, const A(&x)[kBatch][kLanes<T>]) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int j = 0; j < kLanes<T>; ++j) {
          const int64_t column = first + i * step + j;
          if (column < end) use(x[i][j], column);
        }
      }
    });
  });
  for (int64_t i = cluster_rank() * warps + warp; i < call.k; i += cluster_size() * warps) {
    const unsigned place = place_among(found, call.k, found[i]);
    if (lane == 0) out.write(place, order.column(found[i]));
  }
}

template <class T>
void launch_forward(const TopkSoftmaxForward& call, void* stream) {
  using A = Accumulator<T>;
  const LogitsRows& rows = call.rows;
  const RowShape row = shape_of_row(rows.vocab_size, kLanes<T>);
  const int64_t turn = int64_t(row.cluster) * row.threads * kLanes<T> * kBatch;  // columns
  int64_t groups = (rows.vocab_size + turn - 1) / turn * kBatch * (row.threads / kWarp);
  if (int64_t(sizeof(TopkMemory<A>)) + groups * int64_t(sizeof(Key<A>)) > int64_t(most_shared_bytes())) groups = 0;
  const unsigned bytes = unsigned(sizeof(TopkMemory<A>) + groups * sizeof(Key<A>));
  launch(rows.standardize ? forward<T, true> : forward<T, false>,
         Shape{rows.all_slots() * row.cluster, row.threads, row.cluster, bytes}, stream, call, groups);
}

}  // namespace topk_softmax_kernels

extern const TopkSoftmax topk_softmax = {
    {launch_forward<float>, launch_forward<bfloat16>, launch_forward<float16>, launch_forward<double>}};

}  // namespace mlot::cuda
