// The rows' scalars and the columns' sums of probability, in one read of the logits where a cluster holds a row.
#include "mlot/cuda/column_sums.h"

#include "mlot/cuda/launch.h"
#include "mlot/cuda/row_statistics.h"

namespace mlot::cuda {
inline namespace column_sums_kernels {

// What a cluster writes of a slot: its scalars, those of `group` with the rest or alone.
template <class A, int kCount>
__device__ inline void write_scalars(const ColumnSums& call, TemperatureGroup group, int64_t slot,
                                     const Scale<A>& scale, const double (&log_total)[kCount],
                                     const double (&expected)[kCount]) {
  if (group.hot == 0 || group.cold == 0) save(call.saved, slot, scale);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t place = (i == 0 ? group.hot : group.cold) * slots_of(call.rows) + slot;
    put<A>(call.saved.log_total, place, log_total[i]);
    put<A>(call.saved.expected, place, expected[i]);
  }
}

// Owns one slot with a cluster: reads its row once (standardized twice), writes its scalars at the temperatures of
// `group`.
template <class T, bool kStandardize, int kCount, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3) scalars(ColumnSums call, TemperatureGroup group) {
  MLOT_SHARED_MEMORY(unsigned char, shared);
  const int64_t slot = blockIdx.x / cluster_size();
  const bool writes = cluster_rank() == 0 && threadIdx.x == 0;
  const T* row = row_of<T>(call.rows, slot);
  RowStatistics<A, kCount> made{{0, 0, 0, 0}, {}, {}};
  if (row) made = statistics<kStandardize, kCount>(row, call.rows, call.temperatures.at[group.hot], shared);
  if (writes) write_scalars(call, group, slot, made.scale, made.log_total, made.expected);
}

// The slots of one part of a sequence, [first, first + count).
template <class T>
struct Part {
  int64_t first;
  const int64_t* index;
  const T* sequence;
  int64_t stride;
  int count;

  __device__ Part(const LogitsRows& rows, int64_t part, int64_t parts) : stride(rows.row_stride) {
    const int64_t number = part / parts, before = part % parts * kPartialRows, left = rows.slots - before;
    first = number * rows.slots + before;
    index = rows.index + first;
    sequence = static_cast<const T*>(rows.values) + number * rows.batch_stride;
    count = int(left < kPartialRows ? left : kPartialRows);
  }

  // The first slot from number i on that counts, or `count`.
  __device__ int counted_from(int i) const {
    while (i < count && index[i] < 0) ++i;
    return i;
  }

  __device__ const T* row(int i) const { return sequence + index[i] * stride; }
};

// Writes lanes of sums, of which whole vectors are aligned.
template <class A, int kLanes>
__device__ inline void write_sums(A* to, const A (&sums)[kLanes]) {
  constexpr int kAtOnce = 16 / int(sizeof(A));
#pragma unroll
  for (int i = 0; i < kLanes; i += kAtOnce) {
    Vector<A> v;
#pragma unroll
    for (int lane = 0; lane < kAtOnce; ++lane) v.lane[lane] = sums[i + lane];
    *reinterpret_cast<Vector<A>*>(to + i) = v;
  }
}

// Threads of a block of the cluster's kernel, and the vectors that each holds of a row: 40 columns and their sums, in
// registers.
constexpr unsigned kClusterThreads = 512;
template <class T>
constexpr int kHeld = 40 / kLanes<T>;

// Owns one part of a sequence with a cluster, of whose columns each block has a stretch: reads each of its rows once,
// writes their scalars and the part's sums. One exp per column, for two temperatures too. Rows are not standardized.
//
// Two rows have room in shared memory: while one is added up the next one is looked at for its peak, and the one behind
// it is on its way. So one join over the cluster gives a row's sums and the next row's peak, and what a column gets
// depends on its logit and its row alone: equal columns have equal sums, whichever threads own them.
template <class T, int kCount>
__global__ void __launch_bounds__(kClusterThreads, 1)
    sums_in_a_cluster(ColumnSums call, TemperatureGroup group, int64_t parts, int columns_of_block) {
  using Sums = ExponentialSums<float, kCount>;  // of a row; the peak is the next row's
  MLOT_SHARED_MEMORY(unsigned char, shared);
  auto* const joins = reinterpret_cast<Sums*>(shared);
  const LogitsRows& rows = call.rows;
  const int64_t part_number = blockIdx.x / cluster_size();
  const Part<T> part(rows, part_number, parts);
  const int begin = int(cluster_rank()) * columns_of_block, left = int(rows.vocab_size) - begin;
  const int count = left < columns_of_block ? left : columns_of_block, mine = int(threadIdx.x) * kLanes<T>;
  const int step = int(blockDim.x) * kLanes<T>, left_of_mine = count - mine;

  // The block's columns of a row are copied by the aligned 16 bytes they lie in, and so begin behind up to 14 others.
  const auto address = [&](int i) { return reinterpret_cast<uintptr_t>(part.row(i) + begin); };
  const auto lines_of = [&](unsigned number) {
    return reinterpret_cast<uint4*>(shared + kJoin<Sums>) + number % 2 * (kHeld<T> * blockDim.x + 1);
  };
  const auto start_row = [&](int row, unsigned number) {
    if (row < part.count && count > 0) {
      const uintptr_t past = address(row) % 16;
      const auto* from = reinterpret_cast<const uint4*>(address(row) - past);
      const int n = (int(past) + count * int(sizeof(T)) + 15) / 16;
      for (int i = threadIdx.x; i < n; i += blockDim.x) start_copy(lines_of(number) + i, from + i);
    }
    end_of_copies();
  };
  const auto vector_of = [&](int row, unsigned number, int i) {
    return vector_at<T>(lines_of(number) + (i * step + mine) / kLanes<T>, address(row) % 16);
  };
  // This thread's largest logit of a row that has been copied, or nearly; for all threads it is there behind this.
  const auto peak_of = [&](int row, unsigned number) {
    wait_for_all_but_one();
    __syncthreads();
    float peak = -INFINITY;
#pragma unroll 2  // registers are scarce
    for (int i = 0; i < kHeld<T>; ++i) {
      if (i * step >= count) continue;
      const Vector<T> raw = vector_of(row, number, i);
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        peak = larger(peak, i * step + lane < left_of_mine ? widen(raw.lane[lane]) : -INFINITY);
      }
    }
    return peak;
  };
  const auto both = [](Sums a, const Sums& b) {
    a.peak = larger(a.peak, b.peak);
#pragma unroll
    for (int i = 0; i < kCount; ++i) a.total[i] += b.total[i], a.moment[i] += b.moment[i];
    return a;
  };

  float sums[kHeld<T>][kLanes<T>] = {};
  const float factor = float(call.temperatures.factor[group.hot]);
  const bool ranks_cold = group.cold == 0;
  int row = part.counted_from(0), next = part.counted_from(row + 1);
  start_row(row, 0);
  start_row(next, 1);
  Sums all;
  if (row < part.count) {
    all.peak = peak_of(row, 0);
    all = over_cluster(all, both, joins);
  }
  for (unsigned number = 0; row < part.count; ++number) {
    const float peak = all.peak, base = peak == -INFINITY ? 0.f : peak;
    Vector<T> raw[kHeld<T>];
#pragma unroll
    for (int i = 0; i < kHeld<T>; ++i) raw[i] = vector_of(row, number, i);
    __syncthreads();  // all threads have what they need of this row
    const int behind_next = part.counted_from(next + 1);
    start_row(behind_next, number);
    float x[kHeld<T>][kLanes<T>];
#pragma unroll
    for (int i = 0; i < kHeld<T>; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        x[i][lane] = i * step + lane < left_of_mine ? widen(raw[i].lane[lane]) : -INFINITY;
      }
    }
    Sums own;
#pragma unroll
    for (int i = 0; i < kHeld<T>; ++i) {
      if (i * step >= count) continue;
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        const float e = own.add(x[i][lane] - base, factor);
        x[i][lane] = kCount > 1 && ranks_cold ? e * e : e;
      }
    }
    if (next < part.count) own.peak = peak_of(next, number + 1);
    offer_to_cluster(own, both, joins, number + 1);
    const float of_row = power_of_two(at<float>(rows.log_scale, part.first + row) * float(kLog2E));
    all = joined_over_cluster(both, joins, number + 1);
    const float weight = __fdividef(of_row, total_of(ranks_cold ? all.total[kCount - 1] : all.total[0], peak));
#pragma unroll
    for (int i = 0; i < kHeld<T>; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) sums[i][lane] += x[i][lane] * weight;
    }
    if (cluster_rank() == 0 && threadIdx.x == 0) {  // behind the loop the logs are made, which would hold up a row
      const int64_t slot = part.first + row;
      put<float>(call.saved.peak, slot, peak);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int64_t place = (i == 0 ? group.hot : group.cold) * slots_of(rows) + slot;
        put<float>(call.saved.log_total, place, total_of(all.total[i], peak));
        put<float>(call.saved.expected, place, all.moment[i]);
      }
    }
    row = next, next = behind_next;
  }
  float* const out = static_cast<float*>(call.sums) + part_number * call.width + begin + mine;
#pragma unroll
  for (int i = 0; i < kHeld<T>; ++i) {
    if (i * step < left_of_mine) write_sums(out + i * step, sums[i]);
  }
  if (cluster_rank() != 0) return;
  __syncthreads();
  for (int i = threadIdx.x; i < part.count; i += blockDim.x) {
    const int64_t slot = part.first + i;
    const bool counts = part.index[i] >= 0;
    double log_total[kCount] = {}, expected[kCount] = {};
#pragma unroll
    for (int r = 0; r < kCount && counts; ++r) {
      const int64_t place = (r == 0 ? group.hot : group.cold) * slots_of(rows) + slot;
      const double total = at<float>(call.saved.log_total, place);
      log_total[r] = log(total);
      expected[r] = double(at<float>(call.saved.expected, place)) / total;
    }
    const Scale<float> scale{counts ? at<float>(call.saved.peak, slot) : 0.f, 0, counts ? 1.f : 0.f, 0};
    write_scalars<float>(call, group, slot, scale, log_total, expected);
  }
}

constexpr int kTileVectors = 2;  // of a thread

// Owns a tile of one part's columns: reads their logits in all its rows, whose scalars are there, and writes their
// sums.
template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads) sums_of_a_tile(ColumnSums call, int64_t parts, int64_t tiles) {
  const LogitsRows& rows = call.rows;
  const int64_t part_number = blockIdx.x / tiles, step = int64_t(blockDim.x) * kLanes<T>;
  const Part<T> part(rows, part_number, parts);
  const int64_t begin = blockIdx.x % tiles * kTileVectors * step + threadIdx.x * kLanes<T>;
  A sums[kTileVectors][kLanes<T>] = {};
  for (int number = part.counted_from(0); number < part.count; number = part.counted_from(number + 1)) {
    const T* row = part.row(number);
    const int64_t slot = part.first + number;
    A x[kTileVectors][kLanes<T>];
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) load(row, begin + i * step, rows.vocab_size, A(-INFINITY), x[i]);
    const A peak = at<A>(call.saved.peak, slot);
    const A factor = A(call.temperatures.factor[0]) / at<A>(call.saved.scale, slot);
    const A weight = power_of_two((at<A>(rows.log_scale, slot) - at<A>(call.saved.log_total, slot)) * A(kLog2E));
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        sums[i][lane] += power_of_two((x[i][lane] - peak) * factor) * weight;
      }
    }
  }
  A* const out = static_cast<A*>(call.sums) + part_number * call.width;
#pragma unroll
  for (int i = 0; i < kTileVectors; ++i) {
    if (begin + i * step < call.width) write_sums(out + begin + i * step, sums[i]);
  }
}

// Owns a vector of columns of one ranking with each thread: adds its parts, in order, into the first.
template <class A>
__global__ void __launch_bounds__(kThreads) add_parts(A* sums, int64_t parts, int64_t width) {
  const int64_t tiles = (width / kLanes<A> + blockDim.x - 1) / blockDim.x;
  const int64_t column = (blockIdx.x % tiles * blockDim.x + threadIdx.x) * kLanes<A>;
  if (column >= width) return;
  A* const first = sums + blockIdx.x / tiles * parts * width + column;
  Vector<A> all = *reinterpret_cast<const Vector<A>*>(first);
  for (int64_t part = 1; part < parts; ++part) {
    const Vector<A> more = *reinterpret_cast<const Vector<A>*>(first + part * width);
#pragma unroll
    for (int lane = 0; lane < kLanes<A>; ++lane) all.lane[lane] += more.lane[lane];
  }
  *reinterpret_cast<Vector<A>*>(first) = all;
}

template <class T, int kCount>
void launch_scalars(const ColumnSums& call, TemperatureGroup group, void* stream) {
  const RowShape row = shape_of_row(call.rows.vocab_size, kLanes<T>);
  const Shape shape{call.rows.all_slots() * row.cluster, row.threads, row.cluster,
                    kStatisticsBytes<Accumulator<T>, kCount>};
  launch(call.rows.standardize ? scalars<T, true, kCount> : scalars<T, false, kCount>, shape, stream, call, group);
}

template <class T>
void launch_scalars(const ColumnSums& call, const std::vector<TemperatureGroup>& groups, size_t from, void* stream) {
  for (size_t i = from; i < groups.size(); ++i) {
    (groups[i].cold < 0 ? launch_scalars<T, 1> : launch_scalars<T, 2>)(call, groups[i], stream);
  }
}

// Whether a cluster holds a row; if so, the kernel is launched.
template <class T, int kCount>
bool launch_in_a_cluster(const ColumnSums& call, TemperatureGroup group, int64_t parts, void* stream) {
  const RowShape row = shape_of_row(call.rows.vocab_size, kLanes<T>, kClusterThreads);
  const int64_t held = int64_t(row.threads) * kHeld<T>, vectors = (call.rows.vocab_size + kLanes<T> - 1) / kLanes<T>;
  const int64_t of_block = (vectors + row.cluster - 1) / row.cluster;
  const unsigned bytes = kJoin<ExponentialSums<float, kCount>> + 2 * unsigned(held + 1) * 16;
  if (of_block > held || bytes > most_shared_bytes()) return false;
  const Shape shape{call.rows.sequences * parts * row.cluster, row.threads, row.cluster, bytes};
  launch(sums_in_a_cluster<T, kCount>, shape, stream, call, group, parts, int(of_block) * kLanes<T>);
  return true;
}

}  // namespace column_sums_kernels

template <class T>
void row_scalars(const ColumnSums& call, void* stream) {
  launch_scalars<T>(call, groups_of(call.temperatures), 0, stream);
}

template <class T>
void column_sums(const ColumnSums& call, void* stream) {
  using A = Accumulator<T>;
  const auto groups = groups_of(call.temperatures);
  const int64_t parts = parts_of(call.rows.slots), width = call.width;
  bool in_a_cluster = false;
  if constexpr (sizeof(T) <
                8) {  // for float64 there are too few registers, and for the deviation of a row that is held
    if (!call.rows.standardize) {
      const auto launch = groups[0].cold < 0 ? launch_in_a_cluster<T, 1> : launch_in_a_cluster<T, 2>;
      in_a_cluster = launch(call, groups[0], parts, stream);
    }
  }
  launch_scalars<T>(call, groups, in_a_cluster ? 1 : 0, stream);
  const unsigned threads = threads_of_a_block(kThreads);
  if (!in_a_cluster) {
    const int64_t each = int64_t(threads) * kTileVectors * kLanes<T>, tiles = (width + each - 1) / each;
    launch(sums_of_a_tile<T>, Shape{call.rows.sequences * parts * tiles, threads, 1, 0}, stream, call, parts, tiles);
  }
  if (call.rankings == 0) return;
  const int64_t of_ranking = call.rows.sequences * parts / call.rankings;
  const int64_t tiles = (width / kLanes<A> + threads - 1) / threads;
  if (of_ranking > 1) {
    launch(add_parts<A>, Shape{call.rankings * tiles, threads, 1, 0}, stream, static_cast<A*>(call.sums), of_ranking,
           width);
  }
}

template void row_scalars<float>(const ColumnSums&, void*);
template void row_scalars<bfloat16>(const ColumnSums&, void*);
template void row_scalars<float16>(const ColumnSums&, void*);
template void row_scalars<double>(const ColumnSums&, void*);
template void column_sums<float>(const ColumnSums&, void*);
template void column_sums<bfloat16>(const ColumnSums&, void*);
template void column_sums<float16>(const ColumnSums&, void*);
template void column_sums<double>(const ColumnSums&, void*);

}  // namespace mlot::cuda
