// row_divergence on a GPU, backward: a block owns a stretch of one row's gradient and makes the terms of its columns
// anew. With pairs it looks for those of each column in lists that a cluster has sorted once.
#include "mlot/cuda/divergence_pair.h"
#include "mlot/cuda/launch.h"
#include "mlot/cuda/row_divergence.h"
#include "mlot/cuda/sort_keys.h"

namespace mlot::cuda {
inline namespace row_divergence_backward_kernels {

constexpr int kTurns = 4;  // of a block: tiles of each of its threads

// The scalars of a slot's pair and of the gradient of the side, in a block's shared memory.
template <class B>
struct GradientScalars {
  PairScalars<B> pair;
  B peak, part, total, mean, through;

  __device__ void set(const RowDivergenceBackward& call, int64_t slot) {
    const DivergenceProblem& problem = call.problem;
    const Dtype wider = sizeof(B) == 8 ? Dtype::float64 : Dtype::float32;
    const auto row = [&](int side) {
      const Dtype dtype = problem.dtypes[side];
      const DivergenceSaved<const void*>& saved = call.saved[side];
      return divergence_row<B>(problem.sides[side], scalar_at(saved.peak, dtype, slot),
                               scalar_at(saved.scale, dtype, slot), scalar_at(saved.log_total, dtype, slot));
    };
    pair.student = row(0), pair.teacher = row(1);
    pair.interpolation = B(problem.options.interpolation);
    pair.target_log_total = B(scalar_at(call.target_log_total, wider, slot));
    pair.set_terms(problem, slot, scalar_at(call.share, wider, slot));
    const Dtype dtype = problem.dtypes[call.own];
    const DivergenceSaved<const void*>& saved = call.saved[call.own];
    const double grad = scalar_at(call.grad, dtype, slot) * (call.own == 1 ? problem.options.interpolation : 1);
    const double slope = scalar_at(saved.slope, dtype, slot), temperature = problem.sides[call.own].temperature;
    peak = call.own == 1 ? pair.teacher.peak : pair.student.peak;
    part = B(grad / (temperature * scalar_at(saved.scale, dtype, slot)));
    total = B(scalar_at(saved.total, dtype, slot)), mean = B(scalar_at(saved.mean, dtype, slot));
    through = slope == 0 ? B(0) : B(slope * grad * scalar_at(saved.moment, dtype, slot) / temperature);
  }

  // Of a logit of the side, its part of the row's softmax and its H.
  __device__ B gradient(B x, B softmax, B H) const {
    const B below = x - peak;
    B dx = (H - softmax * total) * part;
    if (through != B(0)) dx -= (below - mean) * through;
    return below == B(-INFINITY) ? B(0) : dx;
  }
};

// Owns a stretch of one row's gradient: reads both rows of its pair there once and writes it once; zeros where no pair
// counts and behind the distribution's columns.
template <class B, bool kFloors>
__global__ void __launch_bounds__(kThreads, 2) backward(RowDivergenceBackward call, int64_t stretches) {
  MLOT_SHARED_MEMORY(GradientScalars<B>, shared);
  constexpr int n = kColumnsAtOnce<B>;
  const DivergenceProblem& problem = call.problem;
  const LogitsRows& rows = problem.sides[call.own];
  const Dtype dtype = problem.dtypes[call.own];
  const int64_t place = blockIdx.x / stretches, step = int64_t(blockDim.x) * n;
  unsigned char* const out = static_cast<unsigned char*>(call.grad_values) + place * rows.width * bytes_of(dtype);
  const int64_t past_alignment = int64_t(reinterpret_cast<uintptr_t>(out) % 16) / bytes_of(dtype);
  const int64_t begin = blockIdx.x % stretches * kTurns * step - past_alignment + threadIdx.x * n;
  const int64_t slot = call.slot_of[place];
  const bool counts = slot >= 0 && problem.sides[1 - call.own].index[slot] >= 0;
  AnyRow<B> student{}, teacher{};
  if (counts) {
    student = any_row<B>(problem.sides[0], problem.dtypes[0], slot);
    teacher = any_row<B>(problem.sides[1], problem.dtypes[1], slot);
    if (threadIdx.x == 0) shared->set(call, slot);
    __syncthreads();
  }
  const GradientScalars<B> scalars = counts ? *shared : GradientScalars<B>{};
#pragma unroll 1
  for (int64_t first = begin; first < begin + kTurns * step && first < rows.width; first += step) {
    B dx[n] = {};
    if (counts) {
      const ColumnTile<B> tile = read_columns(problem, student, teacher, first);
      with_kind(problem.options.kind, [&](auto kind) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const auto m = meet<kFloors>(scalars.pair, tile.x[i], tile.y[i], tile.leaves_out(i));
          const auto term = term_of<decltype(kind)::value>(m, scalars.pair.terms);
          const bool own = call.own == 1;
          dx[i] = scalars.gradient(own ? tile.y[i] : tile.x[i], own ? m.softmax[1] : m.softmax[0],
                                   own ? term.H[1] : term.H[0]);
        }
      });
    }
    write_row(out, dtype, first, rows.width, dx);
  }
}

// Pairs by the side's column: `numbers` [starts[v], starts[v + 1]) are those of the pairs that name v, in their order.
struct PairLists {
  uint32_t *numbers, *columns, *spare_numbers, *spare_columns, *starts;

  __device__ explicit PairLists(const RowDivergenceBackward& call) {
    const int64_t n = call.problem.options.pair_count;
    numbers = call.pair_lists, columns = numbers + n, spare_numbers = columns + n, spare_columns = spare_numbers + n;
    starts = spare_columns + n;
  }
};

// Owns all pairs of the call with one cluster: sorts them by the side's column, those of columns that do not exist
// behind the others, and finds where each column's begin.
__global__ void __launch_bounds__(kThreads, 1) sort_pairs(RowDivergenceBackward call) {
  MLOT_SHARED_MEMORY(SortMemory, memory);
  const PairLists of(call);
  const int64_t vocab_size = call.problem.sides[call.own].vocab_size;
  const int n = int(call.problem.options.pair_count);
  const int first = int(cluster_rank() * blockDim.x + threadIdx.x), threads = int(cluster_size() * blockDim.x);
  for (int i = first; i < n; i += threads) {
    const int64_t column = call.problem.options.pairs[2 * int64_t(i) + call.own];
    of.numbers[i] = uint32_t(i);
    of.columns[i] = uint32_t(column < 0 || column > vocab_size ? vocab_size : column);
  }
  sort_keys(of.columns, of.spare_columns, of.numbers, of.spare_numbers, n, *memory);
  for (int64_t column = first; column <= vocab_size; column += threads) {
    of.starts[column] = uint32_t(first_without(0, n, [&](int i) { return of.columns[i] < uint32_t(column); }));
  }
}

// Owns a stretch of one row's gradient where pairs of columns meet: a thread adds up one column's pairs in their order,
// then the next one's, and reads the other side's row where they name it.
template <class B, bool kFloors>
__global__ void __launch_bounds__(kThreads, 2) backward_of_pairs(RowDivergenceBackward call, int64_t stretches) {
  MLOT_SHARED_MEMORY(GradientScalars<B>, shared);
  const DivergenceProblem& problem = call.problem;
  const LogitsRows& rows = problem.sides[call.own];
  const Dtype dtype = problem.dtypes[call.own];
  const int64_t place = blockIdx.x / stretches, slot = call.slot_of[place];
  const int64_t begin = blockIdx.x % stretches * kTurns * blockDim.x + threadIdx.x;
  unsigned char* const out = static_cast<unsigned char*>(call.grad_values) + place * rows.width * bytes_of(dtype);
  const bool counts = slot >= 0 && problem.sides[1 - call.own].index[slot] >= 0;
  AnyRow<B> student{}, teacher{};
  if (counts) {
    student = any_row<B>(problem.sides[0], problem.dtypes[0], slot);
    teacher = any_row<B>(problem.sides[1], problem.dtypes[1], slot);
    if (threadIdx.x == 0) shared->set(call, slot);
    __syncthreads();
  }
  const GradientScalars<B> scalars = counts ? *shared : GradientScalars<B>{};
  const PairLists of(call);
#pragma unroll 1
  for (int64_t column = begin; column < begin + kTurns * blockDim.x && column < rows.width; column += blockDim.x) {
    B dx = 0;
    if (counts && column < rows.vocab_size) {
      const bool own = call.own == 1;
      const B x = read_column(any_row<B>(rows, dtype, slot), column, rows.vocab_size);
      const DivergenceRow<B> row = own ? scalars.pair.teacher : scalars.pair.student;
      B H = 0;
      for (uint32_t i = of.starts[column]; i < of.starts[column + 1]; ++i) {
        const MetByPair<B> met(problem, student, teacher, of.numbers[i]);
        const auto m = meet<kFloors>(scalars.pair, met.x, met.y, met.left_out);
        with_kind(problem.options.kind, [&](auto kind) {
          const auto term = term_of<decltype(kind)::value>(m, scalars.pair.terms);
          H += own ? term.H[1] : term.H[0];
        });
      }
      dx = scalars.gradient(x, row.softmax(x), H);
    }
    with_dtype<B>(dtype, [&](auto element) {
      using T = decltype(element);
      narrow(Accumulator<T>(dx), reinterpret_cast<T*>(out)[column]);
    });
  }
}

// Owns a slot with each thread: dl/d(log scale) = grad (sum of H), of which forward left kappa p out where it adds
// nothing to the gradient of the logits.
__global__ void backward_of_log_scale(RowDivergenceBackward call) {
  const DivergenceProblem& problem = call.problem;
  const int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= slots_of(problem.sides[0])) return;
  const Dtype dtype = problem.dtypes[call.own],
              wider = problem.dtypes[1 - call.own] == Dtype::float64 ? Dtype::float64 : dtype;
  double gradient = 0;
  if (problem.sides[0].index[slot] >= 0 && problem.sides[1].index[slot] >= 0) {
    double kappa = 0;
    if (is_whole(problem)) {
      kappa = problem.constants.kappa * (2 * scalar_at(call.share, wider, slot) - 1) * (call.own == 1 ? 1 : -1);
    }
    const double mass = exp(scalar_at(problem.sides[call.own].log_scale, dtype, slot));
    const double total = scalar_at(call.saved[call.own].total, dtype, slot);
    gradient = scalar_at(call.grad, dtype, slot) * (total + kappa * mass);
  }
  put_scalar(call.grad_log_scale, dtype, slot, gradient);
}

template <class B>
void launch_backward(const RowDivergenceBackward& call, void* stream) {
  const LogitsRows& rows = call.problem.sides[call.own];
  const unsigned threads = threads_of_a_block(kThreads);
  const bool pairs = call.problem.options.pairs, floors = call.problem.options.floor > 0;
  write_slots(rows, call.slot_of, stream);
  if (pairs) {
    const RowShape shape = shape_of_row(call.problem.options.pair_count, 1);
    launch(sort_pairs, Shape{shape.cluster, shape.threads, shape.cluster, sort_bytes(shape.threads)}, stream, call);
  }
  const int64_t each = int64_t(threads) * kTurns * (pairs ? 1 : kColumnsAtOnce<B>);
  const int64_t most_in_front = pairs ? 0 : 16 / bytes_of(call.problem.dtypes[call.own]) - 1;  // of what is aligned
  const int64_t stretches = pieces(rows.width + most_in_front, each);
  const auto without = pairs ? backward_of_pairs<B, false> : backward<B, false>;
  const auto with = pairs ? backward_of_pairs<B, true> : backward<B, true>;
  launch(floors ? with : without,
         Shape{rows.all_positions() * stretches, threads, 1, unsigned(sizeof(GradientScalars<B>))}, stream, call,
         stretches);
  launch(backward_of_log_scale, Shape{pieces(rows.all_slots(), threads), threads, 1, 0}, stream, call);
}

}  // namespace row_divergence_backward_kernels

void launch_row_divergence_backward(const RowDivergenceBackward& call, void* stream) {
  (call.problem.in_double() ? launch_backward<double> : launch_backward<float>)(call, stream);
}

}  // namespace mlot::cuda
