#include "mlot/cuda/gradient_at_columns.h"

#include "mlot/cuda/row_gradient.h"

namespace mlot::cuda {
inline namespace gradient_at_columns_kernels {

constexpr unsigned kFewThreads = 128;  // of a block that owns a row's k columns

// Whether a row of gradient has one temperature, two of which one is twice the other, or others.
enum class Kind { one, doubled, several };

__device__ inline const int64_t* columns_of(const GradientAtColumns& call, int64_t slot) {
  return call.columns + (call.columns_of_each_row ? slot : slot / call.rows.slots) * call.k;
}

// Columns that do not exist or are not looked at pass nothing on.
__device__ inline bool passes(const LogitsRows& rows, int64_t column) {
  return column >= 0 && column < rows.vocab_size && !(rows.column_mask && !rows.column_mask[column]);
}

// dl/dlog p of column number i at temperature r; at the first with what the kept mass passes on.
template <class A>
__device__ inline double upstream(const GradientAtColumns& call, int r, int64_t slot, int64_t i) {
  const int64_t of_first = slot * call.k + i;
  double h = at<A>(call.grad_log_p, r * slots_of(call.rows) * call.k + of_first);
  if (r == 0 && call.grad_mass) h += double(at<A>(call.grad_mass, slot)) * exp(double(at<A>(call.log_p, of_first)));
  return h;
}

// Of the upstream gradients h of a row: all, times x - peak, and those at -inf.
struct UpstreamSums {
  double total = 0, moment = 0, absent = 0;
};

// Owns one slot with a block: reads its k upstream gradients and logits, writes what the whole row's gradient needs of
// them, and the gradient of its log scale. Sums are float64.
template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kFewThreads) coefficients(GradientAtColumns call) {
  MLOT_SHARED_MEMORY(UpstreamSums, shared);
  const LogitsRows& rows = call.rows;
  const int64_t slot = blockIdx.x, slots = slots_of(rows);
  const T* row = row_of<T>(rows, slot);
  if (!row) {
    if (threadIdx.x == 0) put<A>(call.grad_log_scale, slot, 0);
    return;
  }
  const int64_t* columns = columns_of(call, slot);
  const A peak = at<A>(call.saved.peak, slot);
  const double scale = at<A>(call.saved.scale, slot), of_lse = at<A>(call.grad_lse, slot);
  double all_temperatures = 0, deviation_part = 0;
  for (int r = 0; r < call.temperatures.count; ++r) {
    UpstreamSums mine;
    for (int64_t i = threadIdx.x; i < call.k; i += blockDim.x) {
      const int64_t column = columns[i];
      if (!passes(rows, column)) continue;
      const double h = upstream<A>(call, r, slot, i);
      const A below = widen(row[column]) - peak;
      mine.total += h;
      if (below == A(-INFINITY)) {
        mine.absent += h;
      } else {
        mine.moment += h * double(below);
      }
    }
    const auto add = [](const UpstreamSums& a, const UpstreamSums& b) {
      return UpstreamSums{a.total + b.total, a.moment + b.moment, a.absent + b.absent};
    };
    const UpstreamSums all = over_cluster(mine, add, shared);
    const double temperature = call.temperatures.at[r], log_total = at<A>(call.saved.log_total, r * slots + slot);
    const double shared_by_all = all.total - of_lse, expected = at<A>(call.saved.expected, r * slots + slot);
    const double moment = all.moment + double(peak) * (of_lse - all.absent) - shared_by_all * expected;
    all_temperatures += all.total;
    deviation_part += moment / temperature;
    if (threadIdx.x == 0) {
      put<A>(call.weight, r * slots + slot, -shared_by_all * exp(-log_total) / (temperature * scale));
    }
  }
  if (threadIdx.x != 0) return;
  const double slope = at<A>(call.saved.slope, slot);
  put<A>(call.through, slot, slope == 0 ? 0 : -slope * deviation_part);
  put<A>(call.grad_log_scale, slot, all_temperatures);
}

// Logits become their gradient, but for what the kept columns get beside it: one exp for one temperature and for two of
// Kind::doubled.
template <Kind kKind, class A, int kBatch, int kLanes>
__device__ inline void make_dense(const GradientAtColumns& call, int64_t slot, A (&x)[kBatch][kLanes]) {
  const Temperatures& temperatures = call.temperatures;
  const int64_t slots = slots_of(call.rows);
  const A peak = at<A>(call.saved.peak, slot), mean = at<A>(call.saved.mean, slot);
  const A through = at<A>(call.through, slot), scale = at<A>(call.saved.scale, slot);
  A dx[kBatch][kLanes];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      x[i][lane] -= peak;
      dx[i][lane] = through == 0 ? A(0) : (x[i][lane] - mean) * through;
    }
  }
  const int hot = kKind == Kind::doubled && temperatures.at[1] > temperatures.at[0];
  const A square = kKind == Kind::doubled ? at<A>(call.weight, (1 - hot) * slots + slot) : A(0);
  for (int r = hot; r < (kKind == Kind::several ? temperatures.count : hot + 1); ++r) {
    const A factor = A(temperatures.factor[r]) / scale, weight = at<A>(call.weight, r * slots + slot);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        const A e = power_of_two(x[i][lane] * factor);
        dx[i][lane] += kKind == Kind::doubled ? e * (weight + e * square) : e * weight;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) x[i][lane] = x[i][lane] == A(-INFINITY) ? A(0) : dx[i][lane];
  }
}

// Owns a stretch of one row's gradient: reads its logits once and writes it once; then, a warp for each, the kept
// columns in it anew, from their logits and not from what was rounded. A column that stands several times among the k
// gets the sum of its gradients, every time.
template <class T, Kind kKind, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3)
    backward(GradientAtColumns call, int64_t stretches) {
  const LogitsRows& rows = call.rows;
  const Stretch<T> mine = write_stretch<T>(
      rows, call.slot_of, call.grad_values, stretches,
      [&](int64_t slot, const T*, int64_t, int64_t, GradientVectors<T>& x) { make_dense<kKind>(call, slot, x); });
  if (mine.slot < 0) return;
  __syncthreads();  // what is written anew has been written
  const int64_t* columns = columns_of(call, mine.slot);
  const int lane = threadIdx.x % kWarp;
  for (int64_t start = threadIdx.x - lane; start < call.k; start += blockDim.x) {
    const int64_t candidate = start + lane < call.k ? columns[start + lane] : -1;
    const bool kept = candidate >= mine.first && candidate < mine.last && passes(rows, candidate);
    for (unsigned pending = __ballot_sync(~0u, kept); pending; pending &= pending - 1) {
      const int64_t column = columns[start + __ffs(pending) - 1];
      double own = 0;
      for (int64_t i = lane; i < call.k; i += kWarp) {
        if (columns[i] != column) continue;
        for (int r = 0; r < call.temperatures.count; ++r) {
          own += upstream<A>(call, r, mine.slot, i) * (call.temperatures.factor[r] * kLog2);
        }
      }
      own = over_warp(own, [](double a, double b) { return a + b; });
      A x[1][1] = {{widen(row_of<T>(rows, mine.slot)[column])}};
      const bool present = x[0][0] - at<A>(call.saved.peak, mine.slot) != A(-INFINITY);
      make_dense<kKind>(call, mine.slot, x);
      if (lane == 0 && present) narrow(x[0][0] + A(own) / at<A>(call.saved.scale, mine.slot), mine.out[column]);
    }
  }
}

template <class T>
void launch_backward(const GradientAtColumns& call, void* stream) {
  const unsigned threads = threads_of_a_block(kFewThreads);
  launch(coefficients<T>, Shape{call.rows.all_slots(), threads, 1, kJoin<UpstreamSums>}, stream, call);
  const Temperatures& t = call.temperatures;
  const bool doubled = t.count == 2 && (t.at[0] == 2 * t.at[1] || t.at[1] == 2 * t.at[0]);
  const auto kernel = t.count == 1 ? backward<T, Kind::one>
                      : doubled    ? backward<T, Kind::doubled>
                                   : backward<T, Kind::several>;
  launch_stretches<T>(kernel, call, stream);
}

}  // namespace gradient_at_columns_kernels

extern void (*const gradient_at_columns[4])(const GradientAtColumns&, void* stream) = {
    launch_backward<float>, launch_backward<bfloat16>, launch_backward<float16>, launch_backward<double>};

}  // namespace mlot::cuda
