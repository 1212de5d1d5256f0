// sorted_l1 on a GPU, backward: a block owns a stretch of a row's gradient and finds signs by the steps that forward
// left; where it left none, a cluster brings both rows of the pair into order once more.
#include "mlot/cuda/sorted_l1_backward.h"

#include "mlot/cuda/row_gradient.h"
#include "mlot/cuda/sorted_l1_launch.h"

namespace mlot::cuda {
inline namespace sorted_l1_backward_kernels {

// What makes a gradient of a logit and its sign:
// dl/dx = 2^((x - peak) factor) weight (sign scale_of_p - total) - (x - peak - mean) through; 0 at -inf.
template <class A>
struct SignedGradient {
  A peak, factor, weight, scale_of_p, total, mean, through;

  __device__ SignedGradient(const SortedL1Backward& call, int64_t slot) {
    const LogitsRows& rows = call.rows;
    const SortedL1Saved<const void*>& saved = call.saved;
    const double grad = at<A>(call.grad, slot), scaled = rows.temperature * double(at<A>(saved.scale, slot));
    peak = at<A>(saved.peak, slot);
    factor = A(kLog2E / scaled);
    weight = A(grad * exp(-double(at<A>(saved.log_total, slot))) / scaled);
    scale_of_p = A(exp(double(at<A>(rows.log_scale, slot))));
    total = at<A>(saved.total, slot);
    mean = at<A>(saved.mean, slot);
    through = A(double(at<A>(saved.slope, slot)) * grad * double(at<A>(saved.moment, slot)) / rows.temperature);
  }

  __device__ A of(A x, A sign) const {
    const A below = x - peak, e = power_of_two(below * factor);
    return below == A(-INFINITY) ? A(0) : e * (weight * (sign * scale_of_p - total)) - (below - mean) * through;
  }
};

__device__ inline bool is_pair(const SortedL1Backward& call, int64_t slot) {
  return call.rows.index[slot] >= 0 && call.other.index[slot] >= 0;
}

template <class A>
__device__ inline const A* steps_of(const SortedL1Backward& call, int64_t slot) {
  return static_cast<const A*>(call.saved.steps) + slot * 2 * kSavedSteps;
}

// Whether a row's column is looked at; it need not exist.
__device__ inline bool looks_at(const LogitsRows& rows, int64_t column) {
  return !rows.column_mask || (column >= 0 && column < rows.vocab_size && rows.column_mask[column]);
}

// Owns a stretch of one row's gradient: reads its logits once, writes it once, one exp for each. A logit's sign is that
// of the last step whose threshold it is below. Zeros where no pair counts and behind the distribution's columns, and
// what does not stay where forward left no steps.
template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3)
    backward_by_steps(SortedL1Backward call, int64_t stretches) {
  const LogitsRows& rows = call.rows;
  const auto gradient = [&](int64_t slot, const T*, int64_t begin, int64_t step, GradientVectors<T>& x) {
    if (!is_pair(call, slot)) {
#pragma unroll
      for (auto& vector : x) {
#pragma unroll
        for (A& value : vector) value = 0;
      }
      return;
    }
    const SignedGradient<A> g(call, slot);
    const A* const steps = steps_of<A>(call, slot);
    const int count = int(steps[0]);
    GradientVectors<T> sign;
#pragma unroll
    for (auto& vector : sign) {
#pragma unroll
      for (A& value : vector) value = steps[1];
    }
    for (int i = 1; i < count; ++i) {
      const A threshold = steps[2 * i], own = steps[2 * i + 1];
#pragma unroll
      for (int j = 0; j < kGradientBatch; ++j) {
#pragma unroll
        for (int lane = 0; lane < kLanes<T>; ++lane) {
          sign[j][lane] = x[j][lane] < threshold ? own : sign[j][lane];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kGradientBatch; ++j) {
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        x[j][lane] = g.of(x[j][lane], looks_at(rows, begin + j * step + lane) ? sign[j][lane] : A(0));
      }
    }
  };
  write_stretch<T>(rows, call.slot_of, call.grad_values, stretches, gradient);
}

// The gradient of the row of a slot that counts.
template <class T>
__device__ inline T* gradient_row(const SortedL1Backward& call, int64_t slot) {
  const LogitsRows& rows = call.rows;
  return static_cast<T*>(call.grad_values) + (slot / rows.slots * rows.positions + rows.index[slot]) * rows.width;
}

// Owns one pair of rows with a cluster: where forward left no steps of the side, reads both, counts them by value in
// shared memory, puts each value's mean sign in the place of its counter, and reads the side's row again to write its
// gradient.
template <class T, class Other>
__global__ void __launch_bounds__(kPairThreads, 1) backward_by_counting(SortedL1Backward call) {
  MLOT_SHARED_MEMORY(unsigned char, shared);
  const CountMemory memory(shared + kPairJoin<float>);
  const LogitsRows& rows = call.rows;
  const int64_t slot = cluster_number();
  if (!is_pair(call, slot) || steps_of<float>(call, slot)[0] >= 0) return;
  const T* row = row_of<T>(rows, slot);
  const auto own = count_row(row, rows, likelihood<const void*, float>(rows, call.saved, slot), memory, 0, shared);
  const auto other = count_row(row_of<Other>(call.other, slot), call.other,
                               likelihood<const void*, float>(call.other, call.other_saved, slot), memory, 1, shared);
  const Ranking ranking = ranking_of(own, other, call.options, longer(rows, call.other), shared);

  // A run's first rank is the last one of the run before, whose counter may be a sign by then.
  const int threads = int(cluster_size() * blockDim.x), thread = int(cluster_rank() * blockDim.x + threadIdx.x);
  const int each = (own.listed + threads - 1) / threads, begin = thread * each;
  int next, first = begin > 0 && begin < own.listed ? own.run(begin, next).first : 0;
  cluster_sync();
  for (int i = begin; i < begin + each && i < own.listed; ++i) {
    unsigned* const counter = own.counts.at(*own.list.at(unsigned(i)));
    const float x = logit_of<T>(*own.list.at(unsigned(i)));
    const int last = int(*counter);
    const Signs signs = signs_of(first, last, other.meet(own.law.log2_p(x), {}), ranking);
    *counter = __float_as_uint(mean_sign<float>(signs, first, last));
    first = last;
  }
  cluster_sync();

  const SignedGradient<float> g(call, slot);
  T* const out = gradient_row<T>(call, slot);
  for (int64_t column = int64_t(thread) * kLanes<T> - columns_past_alignment(out); column < rows.vocab_size;
       column += int64_t(threads) * kLanes<T>) {
    float x[kLanes<T>];
    load(row, column, rows.vocab_size, -INFINITY, x);
#pragma unroll
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const bool counts = x[lane] != -INFINITY && looks_at(rows, column + lane);
      const float sign = counts ? __uint_as_float(*own.counts.at(descending_key<T>(x[lane]))) : 0.f;
      x[lane] = g.of(x[lane], sign);
    }
    store(out, column, rows.vocab_size, x);
  }
  cluster_sync();  // nobody reads from a block that has ended
}

// Owns every so many-th pair of rows with a cluster: where forward left no steps of the side, reads both, sorts them in
// the cluster's own room, the side's columns along, and writes at every rank its column's gradient.
template <class T, class Other, class A = Accumulator<T>>
__global__ void __launch_bounds__(kPairThreads, 1) backward_by_sorting(SortedL1Backward call) {
  using B = Accumulator<Other>;
  using W = Wider<A, B>;
  MLOT_SHARED_MEMORY(unsigned char, shared);
  SortMemory& memory = *reinterpret_cast<SortMemory*>(shared + kPairJoin<W>);
  const LogitsRows& rows = call.rows;
  const SortRoom& room = call.room;
  auto* const keys = of_room<DescendingKey<T>>(room, room.keys[0]);
  auto* const other_keys = of_room<DescendingKey<Other>>(room, room.keys[1]);
  auto* const columns = of_room<uint32_t>(room, room.columns);
  for (int64_t slot = cluster_number(); slot < slots_of(rows); slot += clusters_of_grid()) {
    if (!is_pair(call, slot) || steps_of<A>(call, slot)[0] >= 0) continue;
    const T* row = row_of<T>(rows, slot);
    const int listed = sort_row(row, rows, keys, of_room<DescendingKey<T>>(room, room.spare), columns,
                                of_room<uint32_t>(room, room.spare_columns), memory, shared);
    const int other_listed =
        sort_row(row_of<Other>(call.other, slot), call.other, other_keys,
                 of_room<DescendingKey<Other>>(room, room.spare), nullptr, nullptr, memory, shared);
    const SortedRow<T> own{keys, listed, likelihood<const void*, A>(rows, call.saved, slot)};
    const SortedRow<Other> other{other_keys, other_listed,
                                 likelihood<const void*, B>(call.other, call.other_saved, slot)};
    const Ranking ranking = ranking_of(own, other, call.options, longer(rows, call.other), shared);
    const SignedGradient<A> g(call, slot);
    T* const out = gradient_row<T>(call, slot);
    const int64_t threads = cluster_size() * blockDim.x, each = (rows.vocab_size + threads - 1) / threads;
    const int64_t offset = (cluster_rank() * blockDim.x + threadIdx.x) * each;
    const int64_t begin = offset < rows.vocab_size ? offset : rows.vocab_size;
    const int64_t end = begin + each < rows.vocab_size ? begin + each : rows.vocab_size;
    int first = 0, last = 0;  // of the ranks that have one sign
    A sign = 0;
    Met met;
    for (int i = int(begin); i < int(end); ++i) {
      const A x = i < listed ? logit_of<T>(keys[i]) : widen(row[columns[i]]);
      if (i >= listed) {
        sign = 0;
      } else if (i >= last) {
        const bool alone = !call.options.mean_over_ties;
        first = alone || i > begin ? i : own.start_of_run(i);
        last = alone ? i + 1 : own.end_of_run(i);
        met = other.meet(W(own.law.log2_p(x)), met);
        sign = mean_sign<A>(signs_of(first, last, met, ranking), first, last);
      }
      narrow(g.of(x, sign), out[columns[i]]);
    }
    cluster_sync();  // before the next pair's keys
  }
}

// Owns a slot with each thread: dl/d(log scale) = grad (sum of sign p).
template <class A>
__global__ void backward_of_log_scale(SortedL1Backward call) {
  const int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= slots_of(call.rows)) return;
  put<A>(call.grad_log_scale, slot,
         is_pair(call, slot) ? at<A>(call.grad, slot) * at<A>(call.saved.total, slot) : A(0));
}

}  // namespace sorted_l1_backward_kernels

template <class Own, class Other>
void launch_sorted_l1_backward(const SortedL1Backward& call, void* stream) {
  launch_stretches<Own>(backward_by_steps<Own>, call, stream);
  launch_slots(backward_of_log_scale<Accumulator<Own>>, call, stream);
  if constexpr (sizeof(Own) == 2 && sizeof(Other) == 2) {
    if (call.options.mean_over_ties && are_counted(call.rows, call.other)) {
      return launch(backward_by_counting<Own, Other>, counting_shape(call.rows), stream, call);
    }
  }
  using W = Wider<Accumulator<Own>, Accumulator<Other>>;
  launch(backward_by_sorting<Own, Other>, sorting_shape<W>(call.rows, call.other, call.room), stream, call);
}

#define MLOT_BY_OTHER(T)                                                                \
  template void launch_sorted_l1_backward<T, float>(const SortedL1Backward&, void*);    \
  template void launch_sorted_l1_backward<T, bfloat16>(const SortedL1Backward&, void*); \
  template void launch_sorted_l1_backward<T, float16>(const SortedL1Backward&, void*);  \
  template void launch_sorted_l1_backward<T, double>(const SortedL1Backward&, void*);
MLOT_BY_OTHER(float)
MLOT_BY_OTHER(bfloat16)
MLOT_BY_OTHER(float16)
MLOT_BY_OTHER(double)
#undef MLOT_BY_OTHER

}  // namespace mlot::cuda
