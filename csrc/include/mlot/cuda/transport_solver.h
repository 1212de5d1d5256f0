// Sinkhorn's iteration on one problem, by the cluster that owns it.
//
// A step is a reading of the tile by rows and one by columns. Column sums are added tile by tile, then over groups of
// threads and blocks, in their order.
#pragma once

#include "mlot/cuda/transport.h"

namespace mlot::cuda {

constexpr TransportArrays kSolverArrays{.of_columns = 3, .of_rows = 3};
constexpr unsigned kMoved = 1, kFar = 2;  // what threads see of a step: v moves, u or v is far from its base

template <class T, bool kOnChip>
struct Solver {
  using A = Accumulator<T>;

  const SinkhornForward& call;
  Problem<T, kOnChip>& problem;
  A *G, *v, *weighted;  // [columns], b v
  A *F, *u, *mass;      // [rows], a u
  A limit;              // a v that moves by less, in units of log 2, does not move
  A *row_history, *column_history;

  __device__ Solver(const SinkhornForward& call_, Problem<T, kOnChip>& problem_) : call(call_), problem(problem_) {
    G = problem.take(problem.columns), v = problem.take(problem.columns), weighted = problem.take(problem.columns);
    F = problem.take(problem.shape.rows), u = problem.take(problem.shape.rows), mass = problem.take(problem.shape.rows);
    constexpr double kLastPlaces = sizeof(A) == 8 ? 0x1p-50 : 0x1p-21;  // moves within them are none
    limit = A((call.options.tolerance + kLastPlaces) * kLog2E);
    row_history = static_cast<A*>(call.outputs.row_history);
    column_history = static_cast<A*>(call.outputs.column_history);
  }

  __device__ bool is_tolerant() const { return call.options.tolerance > 0; }

  __device__ void keep_column(int64_t step, int j, A x) const {
    if (column_history && problem.is_first_block()) column_history[problem.at_column(step, j)] = x;
  }
  __device__ void keep_row(int64_t step, int row, A x) const {
    if (row_history) row_history[problem.at_row(step, row)] = x;
  }

  // What this thread saw of step `step` becomes what all threads of the cluster saw: they see the same columns.
  __device__ unsigned seen_by_all(int64_t step, unsigned seen) const {
    if (seen) atomicOr(&problem.memory.seen[step % 2], seen);
    if (threadIdx.x == 0) problem.memory.seen[(step + 1) % 2] = 0;  // read by all before the last barrier of blocks
    __syncthreads();
    return problem.memory.seen[step % 2];
  }

  // Step 1, on logarithms: makes the base of the first D, and that D where it is kept. Returns kMoved or 0.
  __device__ unsigned first_step() {
    const A scale = problem.scale;
    problem.for_tiles([&](int first, int count) {
      if (first > 0) __syncthreads();
      problem.for_rows(first, count, [&](int row) {
        A* const below = problem.row_of_tile(row - first);
        A peak = -INFINITY;
        for (int j = threadIdx.x % kWarp; j < problem.columns; j += kWarp) {
          below[j] = problem.below_lowest(row, j);
          peak = larger(peak, below[j] * scale);
        }
        const A shift = shift_of(over_warp(peak, [](A x, A y) { return larger(x, y); }));
        const A total = problem.over_columns([&](int j) { return power_of_two(fused(below[j], scale, -shift)); });
        if (threadIdx.x % kWarp != 0) return;
        F[row] = problem.a[row] != 0 ? -(shift + log_two(total)) : A(0);
        u[row] = 1;
        mass[row] = problem.a[row];
        keep_row(0, row, F[row]);
      });
      __syncthreads();
      problem.for_columns([&](int j, int group) { add_first_part(j, group, first, count); });
    });
    cluster_sync();
    unsigned seen = 0;
    problem.for_own_columns([&](int j) {
      G[j] = problem.b[j] != 0 ? -log_sum_of_parts(j) : A(0);
      v[j] = 1;
      weighted[j] = problem.b[j];
      keep_column(0, j, G[j]);
      if (problem.b[j] != 0 && !(fabs(G[j] + log_two(problem.b[j])) <= limit)) seen = kMoved;
    });
    seen = seen_by_all(0, seen);
    if (problem.keeps_tile()) {
      problem.for_rows(0, problem.rows, [&](int row) {
        A* const D = problem.row_of_tile(row);
        for (int j = threadIdx.x % kWarp; j < problem.columns; j += kWarp)
          D[j] = problem.density_of(D[j], F[row], G[j]);
      });
    }
    return seen;
  }

  // log2 of the part of column j's sum, over the rows of a tile that holds lowest - C.
  __device__ void add_first_part(int j, int group, int first, int count) const {
    const auto exponent = [&](int row) { return fused(problem.row_of_tile(row)[j], problem.scale, F[first + row]); };
    A& to = problem.parts_of(0)[group * problem.columns + j];
    A peak = first > 0 ? to : A(-INFINITY);
    for (int row = group; row < count; row += problem.shape.groups) peak = larger(peak, exponent(row));
    const A shift = shift_of(peak);
    A total = first > 0 ? power_of_two(to - shift) : A(0);
    for (int row = group; row < count; row += problem.shape.groups) {
      total += problem.a[first + row] * power_of_two(exponent(row) - shift);
    }
    to = shift + log_two(total);
  }

  __device__ A log_sum_of_parts(int j) const {
    A peak = -INFINITY, total = 0;
    problem.for_parts(problem.parts_of(0), j, [&](A x) { peak = larger(peak, x); });
    const A shift = shift_of(peak);
    problem.for_parts(problem.parts_of(0), j, [&](A x) { total += power_of_two(x - shift); });
    return shift + log_two(total);
  }

  // Step `step` (from 0, at least 1): u of the rows, then v of the columns. One barrier of the cluster: the parts of
  // this step and of the one before lie in two places.
  __device__ unsigned step(int64_t step, bool absorbs) {
    if (absorbs) {
      problem.for_own_columns([&](int j) {
        G[j] += log_two(v[j]);
        v[j] = 1;
        weighted[j] = problem.b[j];
      });
      __syncthreads();
    }
    A* const part = problem.parts_of(step);
    const bool makes = absorbs || !problem.keeps_tile();
    problem.for_tiles([&](int first, int count) {
      if (first > 0) __syncthreads();
      problem.for_rows(first, count,
                       [&](int row) { update_row(step, row, problem.row_of_tile(row - first), absorbs, makes); });
      __syncthreads();
      problem.for_columns([&](int j, int group) {
        problem.add_part(part, j, group, first, count,
                         [&](int row) { return problem.row_of_tile(row)[j] * mass[first + row]; });
      });
    });
    A* const far = part + int64_t(problem.shape.groups) * problem.columns;
    if (threadIdx.x == 0) *far = A(problem.memory.rows_far), problem.memory.rows_far = 0;
    cluster_sync();
    unsigned seen = 0;
    problem.for_own_columns([&](int j) {
      const A before = v[j];
      v[j] = reciprocal(problem.sum_of_parts(part, j), problem.b[j]);
      weighted[j] = problem.b[j] * v[j];
      keep_column(step, j, v[j]);
      if (is_tolerant() && !(fabs(log_two(v[j] / before)) <= limit)) seen |= kMoved;
      if (is_far(v[j])) seen |= kFar;
    });
    if (threadIdx.x < cluster_size() && *problem.of_peer(far, threadIdx.x) != 0) seen |= kFar;
    return seen_by_all(step, seen);
  }

  // One warp's work on a row in a step. `makes`: D is made of the costs, else it lies there.
  __device__ void update_row(int64_t step, int row, A* D, bool absorbs, bool makes) {
    const A base = absorbs ? F[row] + log_two(u[row]) : F[row];
    const A total = makes ? problem.over_columns([&](int j) {
      D[j] = problem.density(row, j, base, G[j]);
      return D[j] * weighted[j];
    })
                          : problem.over_columns([&](int j) { return D[j] * weighted[j]; });
    if (threadIdx.x % kWarp != 0) return;  // all lanes have read F and u
    F[row] = base;
    u[row] = reciprocal(total, problem.a[row]);
    mass[row] = problem.a[row] * u[row];
    keep_row(step, row, u[row]);
    if (is_far(u[row])) atomicOr(&problem.memory.rows_far, 1u);
  }

  // The values, the potentials and the plan of the last step's D, u and v.
  __device__ void write_values() {
    TransportSums<A> mine;
    A* const plan = static_cast<A*>(call.plan);
    problem.for_rows(0, problem.rows, [&](int row) {
      const A a = problem.a[row];
      A moved = 0;
      const A total = problem.over_columns([&](int j) {
        const A D = problem.keeps_tile() ? problem.row_of_tile(row)[j] : problem.density(row, j, F[row], G[j]);
        const A P = D * mass[row] * weighted[j];
        if (plan) plan[problem.at_row(row) * problem.columns + j] = problem.counts(row, j) ? P : A(0);
        if (P != 0) moved += P * problem.cost(row, j) * problem.column_weight(j);
        return P;
      });
      mine.moved += moved;
      if (threadIdx.x % kWarp != 0) return;
      const A last = F[row] + log_two(u[row]);
      mine.mass += total;
      mine.surprise += total * last;
      static_cast<A*>(call.outputs.row_potential)[problem.at_row(row)] =
          a != 0 ? problem.lowest + problem.unit * (last + log_two(a)) : A(0);
    });
    if (problem.is_first_block()) {
      problem.for_own_columns([&](int j) {
        const A b = problem.b[j], last = G[j] + log_two(v[j]);
        mine.surprise += b * last;
        static_cast<A*>(call.outputs.column_potential)[problem.at_column(j)] =
            b != 0 ? problem.unit * (last + log_two(b)) : A(0);
      });
    }
    const auto add = [](const TransportSums<A>& x, const TransportSums<A>& y) {
      return TransportSums<A>{x.moved + y.moved, x.surprise + y.surprise, x.mass + y.mass};
    };
    const auto all = over_cluster(mine, add, reinterpret_cast<TransportSums<A>*>(problem.memory.join));
    if (threadIdx.x != 0 || !problem.is_first_block()) return;
    static_cast<A*>(call.outputs.transported)[problem.number] = all.moved;
    static_cast<A*>(call.outputs.regularized)[problem.number] = problem.unit * all.surprise + problem.lowest * all.mass;
  }

  __device__ void clear_histories(int64_t from) const {
    for (int64_t step = from; step < call.options.iterations; ++step) {
      for (int row = threadIdx.x; row < problem.rows; row += blockDim.x) keep_row(step, row, 0);
      problem.for_own_columns([&](int j) { keep_column(step, j, 0); });
    }
  }

  // Makes all steps and writes all outputs.
  __device__ void solve() {
    const bool each_step = problem.measure();
    unsigned seen = first_step();
    int64_t steps = 1;
    while (steps < call.options.iterations && (!is_tolerant() || seen & kMoved)) {
      seen = step(steps, steps > 1 && (each_step || seen & kFar));
      ++steps;
    }
    write_values();
    clear_histories(steps);
    if (threadIdx.x == 0 && problem.is_first_block()) call.outputs.done[problem.number] = steps;
  }
};

}  // namespace mlot::cuda
