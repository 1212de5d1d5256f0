// token_log_probability on a GPU: a cluster of blocks owns a row forward, a block owns a stretch of a row's gradient.
#include "mlot/cuda/token_log_probability.h"

#include "mlot/cuda/row_gradient.h"
#include "mlot/cuda/row_statistics.h"

namespace mlot::cuda {
inline namespace token_log_probability_kernels {

// Owns one slot with a cluster: reads its row once (standardized twice), writes its log-probability and its scalars.
template <class T, bool kStandardize, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3) forward(TokenForward call) {
  MLOT_SHARED_MEMORY(unsigned char, shared);
  const LogitsRows& rows = call.rows;
  const int64_t slot = blockIdx.x / cluster_size();
  const bool writes = cluster_rank() == 0 && threadIdx.x == 0;
  const T* row = row_of<T>(rows, slot);
  if (!row) {
    if (writes) {
      save(call.saved, slot, Scale<A>{0, 0, 0, 0});
      put<A>(call.saved.log_total, slot, 0);
      put<A>(call.saved.expected, slot, 0);
      put<A>(call.log_probability, slot, 0);
    }
    return;
  }
  const auto made = statistics<kStandardize, 1>(row, rows, rows.temperature, shared);
  if (!writes) return;
  save(call.saved, slot, made.scale);
  put<A>(call.saved.log_total, slot, made.log_total[0]);
  put<A>(call.saved.expected, slot, made.expected[0]);
  const int64_t token = call.tokens[slot];
  A log_p = NAN;
  if (token >= 0 && token < rows.vocab_size) {
    const A scaled = A(rows.temperature) * made.scale.scale;
    log_p = (widen(row[token]) - made.scale.peak) / scaled - A(made.log_total[0]) + at<A>(rows.log_scale, slot);
    if (rows.column_mask && !rows.column_mask[token] && log_p == log_p) log_p = -INFINITY;
  }
  put<A>(call.log_probability, slot, log_p);
}

// Owns a stretch of one row's gradient: reads its logits once, writes it once; zeros where the row does not count and
// behind the distribution's columns.
template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads) backward(TokenBackward call, int64_t stretches) {
  const LogitsRows& rows = call.rows;
  const auto gradient = [&](int64_t slot, const T* row, int64_t begin, int64_t step, GradientVectors<T>& x) {
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
    for (int i = 0; i < kGradientBatch; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        const A below = x[i][lane] - peak;
        x[i][lane] = power_of_two(below * factor) * weight;
        if (passes && begin + i * step + lane == token) x[i][lane] += own;
        if (slope != 0) x[i][lane] += (below - mean) * slope;
        if (below == A(-INFINITY)) x[i][lane] = 0;
      }
    }
  };
  write_stretch<T>(rows, call.slot_of, call.grad_values, stretches, gradient);
}

// Owns a slot with each thread: dl/d(log scale) is the upstream gradient where the token passes it on.
template <class A>
__global__ void backward_of_log_scale(TokenBackward call) {
  const LogitsRows& rows = call.rows;
  const int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= slots_of(rows)) return;
  const int64_t token = call.tokens[slot];
  const bool passes = rows.index[slot] >= 0 && token >= 0 && token < rows.vocab_size;
  put<A>(call.grad_log_scale, slot,
         passes && !(rows.column_mask && !rows.column_mask[token]) ? at<A>(call.grad, slot) : A(0));
}

template <class T>
void launch_forward(const TokenForward& call, void* stream) {
  const RowShape row = shape_of_row(call.rows.vocab_size, kLanes<T>);
  const Shape shape{call.rows.all_slots() * row.cluster, row.threads, row.cluster, kStatisticsBytes<Accumulator<T>, 1>};
  launch(call.rows.standardize ? forward<T, true> : forward<T, false>, shape, stream, call);
}

template <class T>
void launch_backward(const TokenBackward& call, void* stream) {
  launch_stretches<T>(backward<T>, call, stream);
  launch_slots(backward_of_log_scale<Accumulator<T>>, call, stream);
}

}  // namespace token_log_probability_kernels

const TokenLogProbability token_log_probability{
    {launch_forward<float>, launch_forward<bfloat16>, launch_forward<float16>, launch_forward<double>},
    {launch_backward<float>, launch_backward<bfloat16>, launch_backward<float16>, launch_backward<double>},
};

}  // namespace mlot::cuda
