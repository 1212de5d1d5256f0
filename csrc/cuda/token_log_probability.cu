// token_log_probability on a GPU: a cluster of blocks owns a row forward, a block owns a stretch of a row's gradient.
#include "mlot/cuda/token_log_probability.h"

#include "mlot/cuda/launch.h"
#include "mlot/cuda/row_statistics.h"

namespace mlot::cuda {
namespace {

constexpr int kBatch = 2;  // vectors that a thread reads before it uses them

// Owns one slot with a cluster: reads its row once (standardized twice), writes its log-probability and its scalars.
template <class T, bool kStandardize, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3) forward(TokenForward call) {
  MLOT_SHARED_MEMORY(Deviation<A>, shared);
  const LogitsRows& rows = call.rows;
  const int64_t slot = blockIdx.x / cluster_size();
  const bool writes = cluster_rank() == 0 && threadIdx.x == 0;
  const T* row = row_of<T>(rows, slot);
  if (!row) {
    if (writes) {
      save(call.saved, slot, RowStatistics<A>{{0, 0, 0, 0}, 0, 0});
      put<A>(call.log_probability, slot, 0);
    }
    return;
  }
  const auto made = statistics<kStandardize>(row, rows, shared);
  if (!writes) return;
  save(call.saved, slot, made);
  const int64_t token = call.tokens[slot];
  A log_p = NAN;
  if (token >= 0 && token < rows.vocab_size) {
    const A scaled = A(rows.temperature) * made.scale.scale;
    log_p = (widen(row[token]) - made.scale.peak) / scaled - A(made.log_total) + at<A>(rows.log_scale, slot);
    if (rows.column_mask && !rows.column_mask[token] && log_p == log_p) log_p = -INFINITY;
  }
  put<A>(call.log_probability, slot, log_p);
}

// Owns a stretch of one row's gradient: reads its logits once, writes it once; zeros where the row does not count and
// behind the distribution's columns.
template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads) backward(TokenBackward call, int64_t stretches) {
  const LogitsRows& rows = call.rows;
  const int64_t place = blockIdx.x / stretches, stretch = blockIdx.x % stretches;
  T* out = static_cast<T*>(call.grad_values) + place * rows.width;
  const int64_t slot = call.slot_of[place];
  const int64_t step = int64_t(blockDim.x) * kLanes<T>;
  const int64_t begin = stretch * kBatch * step + threadIdx.x * kLanes<T> - columns_past_alignment(out);
  A dx[kLanes<T>] = {};
  if (slot < 0) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) store(out, begin + i * step, rows.width, dx);
    return;
  }
  const T* row = row_of<T>(rows, slot);
  A x[kBatch][kLanes<T>];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) load(row, begin + i * step, rows.vocab_size, A(-INFINITY), x[i]);
  const int64_t token = call.tokens[slot];
  const bool passes = token >= 0 && token < rows.vocab_size && !(rows.column_mask && !rows.column_mask[token]);
  const A peak = at<A>(call.saved.peak, slot), mean = at<A>(call.saved.mean, slot);
  const double grad = passes ? double(at<A>(call.grad, slot)) : 0.0;
  const double scaled = rows.temperature * double(at<A>(call.saved.scale, slot));
  const A of_token = passes ? widen(row[token]) - peak : A(0);
  double moment = -grad * double(at<A>(call.saved.expected, slot));
  moment += of_token == A(-INFINITY) ? -double(peak) * grad : grad * double(of_token);
  const A slope = A(-double(at<A>(call.saved.slope, slot)) * moment / rows.temperature);
  const A factor = A(kLog2E / scaled), own = A(grad / scaled);
  const A weight = A(-grad * exp(-double(at<A>(call.saved.log_total, slot))) / scaled);
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
#pragma unroll
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const A below = x[i][lane] - peak;
      dx[lane] = power_of_two(below * factor) * weight + (passes && begin + i * step + lane == token ? own : A(0));
      if (slope != 0) dx[lane] += (below - mean) * slope;
      if (below == A(-INFINITY)) dx[lane] = 0;
    }
    store(out, begin + i * step, rows.width, dx);
  }
}

// Owns a slot with each thread: dl/d(log scale) is the upstream gradient where the token passes it on.
template <class A>
__global__ void backward_of_log_scale(TokenBackward call) {
  const LogitsRows& rows = call.rows;
  const int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= rows.sequences * rows.slots) return;
  const int64_t token = call.tokens[slot];
  const bool passes = rows.index[slot] >= 0 && token >= 0 && token < rows.vocab_size;
  put<A>(call.grad_log_scale, slot,
         passes && !(rows.column_mask && !rows.column_mask[token]) ? at<A>(call.grad, slot) : A(0));
}

template <class T>
void launch_forward(const TokenForward& call, void* stream) {
  const RowShape row = shape_of_row(call.rows.vocab_size, kLanes<T>);
  const Shape shape{call.rows.all_slots() * row.cluster, row.threads, row.cluster, kStatisticsBytes<Accumulator<T>>};
  launch(call.rows.standardize ? forward<T, true> : forward<T, false>, shape, stream, call);
}

template <class T>
void launch_backward(const TokenBackward& call, void* stream) {
  write_slots(call.rows, call.slot_of, stream);
  const unsigned threads = threads_of_a_block(kThreads);
  const int64_t stretches = stretches_of(call.rows.width, kLanes<T>, kBatch);
  launch(backward<T>, Shape{call.rows.all_positions() * stretches, threads, 1, 0}, stream, call, stretches);
  const int64_t blocks = (call.rows.all_slots() + threads - 1) / threads;
  launch(backward_of_log_scale<Accumulator<T>>, Shape{blocks, threads, 1, 0}, stream, call);
}

}  // namespace

const TokenLogProbability token_log_probability{
    {launch_forward<float>, launch_forward<bfloat16>, launch_forward<float16>, launch_forward<double>},
    {launch_backward<float>, launch_backward<bfloat16>, launch_backward<float16>, launch_backward<double>},
};

}  // namespace mlot::cuda
