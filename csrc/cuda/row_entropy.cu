// row_entropy on a GPU: a cluster of blocks owns a row forward, a block owns a stretch of a row's gradient backward.
#include "mlot/cuda/row_entropy.h"

#include "mlot/cuda/row_gradient.h"
#include "mlot/cuda/row_statistics.h"

namespace mlot::cuda {
inline namespace row_entropy_kernels {

constexpr int kBatch = 2;  // vectors that a thread reads before it uses them

// Sums over columns of 2^t, 2^t u and 2^t u^2, with t = (x - peak) factor and u = t - center: of all columns, and of
// those that are looked at.
template <class A>
struct EntropySums {
  A peak = -INFINITY;
  A total = 0, first = 0;
  A kept_total = 0, kept_first = 0, kept_second = 0;

  // The same sums relative to a higher peak: every t falls.
  __device__ void raise(A higher, A factor) {
    if (peak != A(-INFINITY)) {  // else they are 0, or NaN
      const A fall = (peak - higher) * factor, shrink = power_of_two(fall);
      kept_second = shrink * (kept_second + fall * (2 * kept_first + fall * kept_total));
      kept_first = shrink * (kept_first + fall * kept_total);
      kept_total *= shrink;
      first = shrink * (first + fall * total);
      total *= shrink;
    }
    peak = higher;
  }
};

template <class T, bool kMasked, class A = Accumulator<T>>
__device__ EntropySums<A> sums_of(const T* row, const LogitsRows& rows, A factor, A center) {
  EntropySums<A> sums;
  for_vectors<kBatch>(row, rows.vocab_size, [&](int64_t start, int64_t step, const A(&x)[kBatch][kLanes<T>]) {
    const A below = raise_to(sums, x, factor);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        const A t = (x[i][lane] - below) * factor;
        const A e = power_of_two(t), u = larger(t, A(kSmallest)) - center, eu = e * u;
        sums.total += e;
        sums.first += eu;
        if constexpr (kMasked) {
          const int64_t column = start + i * step + lane;
          if (column < rows.vocab_size && rows.column_mask[column]) {
            sums.kept_total += e;
            sums.kept_first += eu;
            sums.kept_second += eu * u;
          }
        } else {
          sums.kept_second += eu * u;
        }
      }
    }
  });
  if constexpr (!kMasked) sums.kept_total = sums.total, sums.kept_first = sums.first;
  return sums;
}

// Owns one slot with a cluster: reads its row once (standardized twice), writes its entropy and what backward needs.
template <class T, bool kMasked, bool kStandardize, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3) forward(RowEntropyForward call) {
  MLOT_SHARED_MEMORY(EntropySums<A>, shared);
  const LogitsRows& rows = call.rows;
  const int64_t slot = blockIdx.x / cluster_size();
  const bool writes = cluster_rank() == 0 && threadIdx.x == 0;
  const auto write = [&](double entropy, double mass, double peak, double log_total, double mean, double scale,
                         double slope, double moment) {
    put<A>(call.made.entropy, slot, entropy);
    put<A>(call.made.mass, slot, mass);
    put<A>(call.made.peak, slot, peak);
    put<A>(call.made.log_total, slot, log_total);
    put<A>(call.made.mean, slot, mean);
    put<A>(call.made.scale, slot, scale);
    put<A>(call.made.slope, slot, slope);
    put<A>(call.made.moment, slot, moment);
  };
  const T* row = row_of<T>(rows, slot);
  if (!row) {
    if (writes) write(0, 0, 0, 0, 0, 0, 0, 0);
    return;
  }
  Scale<A> scale;
  if constexpr (kStandardize) scale = standardized(row, rows.vocab_size, shared);
  const double factor = kLog2E / (rows.temperature * double(scale.scale));
  const double center = double(scale.mean) * factor;
  const auto join = [factor](EntropySums<A> a, EntropySums<A> b) {
    a.raise(larger(a.peak, b.peak), A(factor));
    b.raise(a.peak, A(factor));
    a.total += b.total;
    a.first += b.first;
    a.kept_total += b.kept_total;
    a.kept_first += b.kept_first;
    a.kept_second += b.kept_second;
    return a;
  };
  const auto sums = over_cluster(sums_of<T, kMasked>(row, rows, A(factor), A(center)), join, shared);
  if (!writes) return;
  const double total = sums.peak == A(-INFINITY) ? NAN : double(sums.total);  // a row of -inf alone is 0 / 0
  const double log_total = log(total), log_scale = at<A>(rows.log_scale, slot);
  // On the columns looked at p = 2^t exp(offset), log p = log(2) u + at_center.
  const double offset = log_scale - log_total, weight = exp(offset);
  const double at_center = weight == 0 ? 0 : offset + kLog2 * center;
  const double mass = weight * sums.kept_total;
  const double entropy = -weight * (sums.kept_first * kLog2 + at_center * sums.kept_total);
  const double moment =
      (mass - entropy) * sums.first / total - weight * (sums.kept_second * kLog2 + (at_center + 1) * sums.kept_first);
  write(entropy, mass, sums.peak, log_total, scale.mean, scale.scale, scale.slope, moment / factor);
}

// Owns a stretch of one row's gradient: reads its logits once, writes it once; zeros where the row does not count and
// behind the distribution's columns.
template <class T, bool kMasked, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads) backward(RowEntropyBackward call, int64_t stretches) {
  const LogitsRows& rows = call.rows;
  const auto gradient = [&](int64_t slot, const T*, int64_t begin, int64_t step, GradientVectors<T>& x) {
    const A grad = at<A>(call.grad, slot), entropy = at<A>(call.saved.entropy, slot);
    const A mass = at<A>(call.saved.mass, slot);
    const A inverse = A(1 / (rows.temperature * double(at<A>(call.saved.scale, slot))));
    const A log_scale = at<A>(rows.log_scale, slot), p_over_q = A(exp(double(log_scale)));
    const A more = p_over_q == 0 ? A(0) : log_scale + 1;  // p = 0 there: not 0 * -inf
    const A through = at<A>(call.saved.slope, slot) * grad * at<A>(call.saved.moment, slot) / A(rows.temperature);
    const A peak = at<A>(call.saved.peak, slot), log_total = at<A>(call.saved.log_total, slot);
    const A mean = at<A>(call.saved.mean, slot);
#pragma unroll
    for (int i = 0; i < kGradientBatch; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        const int64_t column = begin + i * step + lane;
        const A below = x[i][lane] - peak, log_q = below * inverse - log_total, q = power_of_two(log_q * A(kLog2E));
        A of_p = q == 0 ? A(0) : p_over_q * (log_q + more);
        if (kMasked && column >= 0 && column < rows.vocab_size && !rows.column_mask[column]) of_p = 0;
        x[i][lane] = q * (grad * inverse) * (mass - entropy - of_p);
        if (through != 0) x[i][lane] -= (below - mean) * through;
        if (below == A(-INFINITY)) x[i][lane] = 0;
      }
    }
  };
  write_stretch<T>(rows, call.slot_of, call.grad_values, stretches, gradient);
}

// Owns a slot with each thread: dl/d(log scale) = grad (entropy - mass).
template <class A>
__global__ void backward_of_log_scale(RowEntropyBackward call) {
  const int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= slots_of(call.rows)) return;
  const A entropy = at<A>(call.saved.entropy, slot), mass = at<A>(call.saved.mass, slot);
  put<A>(call.grad_log_scale, slot, at<A>(call.grad, slot) * (entropy - mass));
}

template <class T>
void launch_forward(const RowEntropyForward& call, void* stream) {
  using A = Accumulator<T>;
  const RowShape row = shape_of_row(call.rows.vocab_size, kLanes<T>);
  const Shape shape{call.rows.all_slots() * row.cluster, row.threads, row.cluster, kJoin<EntropySums<A>>};
  const auto kernel = call.rows.column_mask   ? call.rows.standardize ? forward<T, true, true> : forward<T, true, false>
                      : call.rows.standardize ? forward<T, false, true>
                                              : forward<T, false, false>;
  launch(kernel, shape, stream, call);
}

template <class T>
void launch_backward(const RowEntropyBackward& call, void* stream) {
  launch_stretches<T>(call.rows.column_mask ? backward<T, true> : backward<T, false>, call, stream);
  launch_slots(backward_of_log_scale<Accumulator<T>>, call, stream);
}

}  // namespace row_entropy_kernels

const RowEntropy row_entropy{
    {launch_forward<float>, launch_forward<bfloat16>, launch_forward<float16>, launch_forward<double>},
    {launch_backward<float>, launch_backward<bfloat16>, launch_backward<float16>, launch_backward<double>},
};

}  // namespace mlot::cuda
