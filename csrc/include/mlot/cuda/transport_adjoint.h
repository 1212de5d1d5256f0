// The gradient of Sinkhorn's iteration on one problem, by the cluster that owns it.
//
// With G_bar = dl/dG after a step, F_bar = dl/dF, alpha = v G_bar and beta = u F_bar (README of sinkhorn), a step adds
// D o (a u alpha^T + beta (b v_before)^T) to epsilon dl/dC: steps with the same D are added up as one product.
#pragma once

#include "mlot/cuda/transport.h"

namespace mlot::cuda {

constexpr TransportArrays kAdjointArrays{.of_columns = 5, .of_rows = 5};

// In device memory, of every step: its base, its alpha and beta, and whether the step after it makes a new base.
template <class A>
struct Steps {
  A *row_base, *column_base;  // [B, L, M], [B, L, N]
  A *beta, *alpha;            // [B, L, M], [B, L, N]
  int* far;                   // [B, L]

  static int64_t bytes(const TransportOptions& options) {
    if (options.gradient != TransportGradient::unrolled) return 0;
    const int64_t each = 2 * (options.rows + options.columns) * int64_t(sizeof(A)) + int64_t(sizeof(int));
    return options.problems * options.iterations * each;
  }

  Steps(const TransportOptions& options, void* room) {
    const int64_t steps = options.problems * options.iterations;
    row_base = static_cast<A*>(room), column_base = row_base + steps * options.rows;
    beta = column_base + steps * options.columns, alpha = beta + steps * options.rows;
    far = reinterpret_cast<int*>(alpha + steps * options.columns);
  }
};

template <class T, bool kOnChip>
struct Adjoint {
  using A = Accumulator<T>;

  const SinkhornBackward& call;
  const Steps<A>& steps;
  Problem<T, kOnChip>& problem;
  A *G, *v, *alpha, *G_bar, *G_sum;  // [columns]
  A *F, *u, *own, *F_sum, *beta;     // [rows]; own: S 1, of the last step alone
  const A *row_history, *column_history;
  A transported, regularized;  // upstream gradients
  A* grad_cost;                // [rows, columns] of this block; epsilon dl/dC until the end
  A mass = 0;                  // of b

  __device__ Adjoint(const SinkhornBackward& call_, const Steps<A>& steps_, Problem<T, kOnChip>& problem_,
                     A* grad_cost_)
      : call(call_), steps(steps_), problem(problem_), grad_cost(grad_cost_) {
    const int columns = problem.columns, rows = problem.shape.rows;
    G = problem.take(columns), v = problem.take(columns), alpha = problem.take(columns);
    G_bar = problem.take(columns), G_sum = problem.take(columns);
    F = problem.take(rows), u = problem.take(rows), own = problem.take(rows);
    F_sum = problem.take(rows), beta = problem.take(rows);
    row_history = static_cast<const A*>(call.saved.row_history);
    column_history = static_cast<const A*>(call.saved.column_history);
    transported = static_cast<const A*>(call.upstream.transported)[problem.number];
    regularized = static_cast<const A*>(call.upstream.regularized)[problem.number];
  }

  __device__ int64_t at_step(int64_t step) const { return problem.number * call.options.iterations + step; }
  __device__ A* gradient_row(int row) const { return grad_cost + int64_t(row) * problem.columns; }

  template <class Use>
  __device__ void for_own_rows(Use use) const {
    for (int row = threadIdx.x; row < problem.rows; row += blockDim.x) use(row);
  }

  // Every thread of a block gets the same, and so does every block.
  __device__ A over_block(A mine) const {
    A* const of_warps = problem.memory.of_warps;
    mine = over_warp(mine, [](A x, A y) { return x + y; });
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = mine;
    __syncthreads();
    A sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += of_warps[warp];
    __syncthreads();
    return sum;
  }

  // Writes the base of each of the `done` steps, as forward had it. That of step 1 is its own F and G, which is also
  // the second one's.
  __device__ void find_bases(int64_t done, bool each_step) const {
    const int64_t warps = blockDim.x / kWarp, warp = cluster_rank() * warps + threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    for (int64_t step = 1 + warp; step < done; step += cluster_size() * warps) {
      const A* const us = row_history + at_step(step) * call.options.rows;
      const A* const vs = column_history + at_step(step) * problem.columns;
      bool far = each_step;
      for (int64_t i = lane; i < call.options.rows; i += kWarp) far = far || is_far(us[i]);
      for (int j = lane; j < problem.columns; j += kWarp) far = far || is_far(vs[j]);
      const bool any = __any_sync(~0u, far);
      if (lane == 0) steps.far[at_step(step)] = any;
    }
    cluster_sync();
    for_own_rows([&](int row) {
      add_up(done, row_history, steps.row_base, [&](int64_t step) { return problem.at_row(step, row); });
    });
    const int64_t threads = int64_t(cluster_size()) * blockDim.x;
    for (int64_t j = int64_t(cluster_rank()) * blockDim.x + threadIdx.x; j < problem.columns; j += threads) {
      add_up(done, column_history, steps.column_base, [&](int64_t step) { return problem.at_column(step, int(j)); });
    }
    cluster_sync();
  }

  template <class Place>
  __device__ void add_up(int64_t done, const A* history, A* bases, Place place) const {
    A base = history[place(0)];
    bases[place(0)] = base;
    for (int64_t step = 1; step < done; ++step) {
      if (makes_base(step) && step > 1) base += log_two(history[place(step - 1)]);
      bases[place(step)] = base;
    }
  }

  // Whether a step's D is another than that of the step before; step 2 and step 1 share theirs, but not u and v.
  __device__ bool makes_base(int64_t step) const { return step == 1 || steps.far[at_step(step - 1)]; }

  __device__ A u_of(int64_t step, int row) const { return step > 0 ? row_history[problem.at_row(step, row)] : A(1); }
  __device__ A v_of(int64_t step, int j) const { return step > 0 ? column_history[problem.at_column(step, j)] : A(1); }

  __device__ void load_base(int64_t step) {
    for_own_rows([&](int row) { F[row] = steps.row_base[problem.at_row(step, row)]; });
    problem.for_own_columns([&](int j) { G[j] = steps.column_base[problem.at_column(step, j)]; });
  }

  __device__ A make(int row, int j, A* D) const {
    D[j] = problem.density(row, j, F[row], G[j]);
    return D[j];
  }

  // D of the tile's rows, each by the warp that reads it in `for_rows`.
  __device__ void make_tile(int first, int count) const {
    problem.for_rows(first, count, [&](int row) {
      A* const D = problem.row_of_tile(row - first);
      for (int j = threadIdx.x % kWarp; j < problem.columns; j += kWarp) make(row, j, D);
    });
  }

  // One pair's plan and S = P dl/dP, in which C cancels against X in log P; `last`: F and G with u and v taken in.
  struct Pair {
    A P, C, S;
  };
  __device__ Pair pair_of(int row, int j, A D, A F_last, A G_last) const {
    const A P = D * (problem.a[row] * u[row]) * (problem.b[j] * v[j]);
    if (P == 0) return {0, 0, 0};
    const A C = problem.cost(row, j);
    A W = transported * problem.column_weight(j) * C +
          regularized * ((problem.lowest + problem.epsilon) + problem.unit * (F_last + G_last));
    if (call.grad_plan) W += static_cast<const A*>(call.grad_plan)[problem.at_row(row) * problem.columns + j];
    return {P, C, P * W};
  }

  // From the last step's D, u and v: S 1 of the rows, S^T 1 of the columns as the first G_bar, the direct gradient.
  __device__ void begin() {
    A* const S_part = problem.parts_of(0);
    A* const moved_part = problem.parts_of(1);
    problem.for_own_columns([&](int j) { alpha[j] = G[j] + log_two(v[j]); });
    __syncthreads();
    problem.for_tiles([&](int first, int count) {
      if (first > 0) __syncthreads();
      problem.for_rows(first, count, [&](int row) {
        A* const out = gradient_row(row);
        const A F_last = F[row] + log_two(u[row]);
        A carried = 0;
        const A S = problem.over_columns([&](int j) {
          const Pair pair = pair_of(row, j, make(row, j, problem.row_of_tile(row - first)), F_last, alpha[j]);
          const A direct = problem.epsilon * (transported * problem.column_weight(j) + regularized);
          out[j] = problem.counts(row, j) ? pair.P * direct - pair.S : A(0);
          carried += pair.P;
          return pair.S;
        });
        carried = over_warp(carried, [](A x, A y) { return x + y; });
        if (threadIdx.x % kWarp != 0) return;
        own[row] = S;
        F_sum[row] = -problem.epsilon * regularized * carried;  // KL's own dependence on the marginals
        beta[row] = F_last;
      });
      __syncthreads();
      problem.for_columns([&](int j, int group) {
        A moved = 0;
        problem.add_part(S_part, j, group, first, count, [&](int row) {
          const Pair pair = pair_of(first + row, j, problem.row_of_tile(row)[j], beta[first + row], alpha[j]);
          moved += pair.P != 0 ? pair.P * pair.C : A(0);
          return pair.S;
        });
        A& to = moved_part[group * problem.columns + j];
        to = first == 0 ? moved : to + moved;
      });
    });
    cluster_sync();
    A b_mass = 0;
    problem.for_own_columns([&](int j) {
      const A b = problem.b[j];
      b_mass += b;
      G_bar[j] = problem.sum_of_parts(S_part, j);
      G_sum[j] = -problem.epsilon * regularized * b;
      if (problem.is_first_block()) {
        static_cast<A*>(call.gradients.column_weight)[problem.at_column(j)] =
            transported * problem.sum_of_parts(moved_part, j);
      }
    });
    mass = over_block(b_mass);
    if (mass == 0) mass = 1;
    cluster_sync();  // all have read both parts
  }

  // Goes back over step `step` (from 0, at least 1). One barrier of the cluster, as in forward.
  __device__ void back(int64_t step, bool is_first_of_base) {
    problem.for_own_columns([&](int j) {
      alpha[j] = v[j] * G_bar[j];
      G_sum[j] += G_bar[j];
      if (problem.is_first_block()) steps.alpha[problem.at_column(step, j)] = alpha[j];
    });
    __syncthreads();
    A* const part = problem.parts_of(step);
    problem.for_tiles([&](int first, int count) {
      if (first > 0) __syncthreads();
      problem.for_rows(first, count, [&](int row) { update_row(step, row, problem.row_of_tile(row - first)); });
      __syncthreads();
      problem.for_columns([&](int j, int group) {
        problem.add_part(part, j, group, first, count,
                         [&](int row) { return problem.row_of_tile(row)[j] * beta[first + row]; });
      });
    });
    cluster_sync();
    A drift = 0;
    problem.for_own_columns([&](int j) {
      v[j] = is_first_of_base ? A(1) : v_of(step - 1, j);
      G_bar[j] = -problem.b[j] * v[j] * problem.sum_of_parts(part, j);
      drift += G_bar[j];
    });
    // G_bar sums to 0, and what rounding leaves of the sum would stay, in the direction of b, through all steps before.
    const A share = over_block(drift) / mass;
    problem.for_own_columns([&](int j) { G_bar[j] -= problem.b[j] * share; });
  }

  // One warp's work on a row in a step.
  __device__ void update_row(int64_t step, int row, A* D) {
    const A met = problem.keeps_tile() ? problem.over_columns([&](int j) { return D[j] * alpha[j]; })
                                       : problem.over_columns([&](int j) { return make(row, j, D) * alpha[j]; });
    if (threadIdx.x % kWarp != 0) return;
    const A F_bar = own[row] - problem.a[row] * u[row] * met;
    own[row] = 0;
    F_sum[row] += F_bar;
    beta[row] = u[row] * F_bar;
    steps.beta[problem.at_row(step, row)] = beta[row];
  }

  // Adds what the steps `from` to `to`, which share the D of F and G, leave in dl/dC.
  __device__ void add_steps(int64_t from, int64_t to) const {
    problem.for_tiles([&](int first, int count) {
      if (!problem.keeps_tile()) {
        __syncthreads();
        make_tile(first, count);
        __syncthreads();
      }
      constexpr int kDown = kOnChip && sizeof(A) == 4 ? 4 : 1;  // more would spill
      for (int row = threadIdx.x / kWarp * kDown; row < count; row += blockDim.x / kWarp * kDown) {
        for (int j = threadIdx.x % kWarp; j < problem.columns; j += kWarp)
          add_steps_at<kDown>(from, to, first, row, count, j);
      }
    });
  }

  // At column j of kDown rows of the tile: a column's numbers serve all of them.
  template <int kDown>
  __device__ void add_steps_at(int64_t from, int64_t to, int first, int row, int count, int j) const {
    A sum[kDown] = {};
    int at[kDown];
#pragma unroll
    for (int i = 0; i < kDown; ++i) at[i] = first + (row + i < count ? row + i : row);
    for (int64_t step = from; step <= to; ++step) {
      const A x = steps.alpha[problem.at_column(step, j)];
      const A y = problem.b[j] * (step == from ? A(1) : v_of(step - 1, j));
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        sum[i] += problem.a[at[i]] * u_of(step, at[i]) * x + steps.beta[problem.at_row(step, at[i])] * y;
      }
    }
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      if (row + i < count && problem.counts(at[i], j))
        gradient_row(at[i])[j] += problem.row_of_tile(row + i)[j] * sum[i];
    }
  }

  // Step 1: its D is the first one, with u = v = 1; its F is made of X alone.
  __device__ void end() {
    problem.for_own_columns([&](int j) { G_sum[j] += G_bar[j]; });
    __syncthreads();
    problem.for_rows(0, problem.rows, [&](int row) {
      const A a = problem.a[row];
      const auto D = [&](int j) {
        return problem.keeps_tile() ? problem.row_of_tile(row)[j] : problem.density(row, j, F[row], G[j]);
      };
      const A F_bar = own[row] - a * problem.over_columns([&](int j) { return D(j) * G_bar[j]; });
      A* const out = gradient_row(row);
      for (int j = threadIdx.x % kWarp; j < problem.columns; j += kWarp) {
        if (!problem.counts(row, j)) continue;
        const A total = out[j] + D(j) * (a * G_bar[j]) + F_bar * problem.density(row, j, F[row], A(0));
        out[j] = total / problem.epsilon;
      }
      if (threadIdx.x % kWarp != 0) return;
      static_cast<A*>(call.gradients.row_marginal)[problem.at_row(row)] = a != 0 ? (F_sum[row] + F_bar) / a : A(0);
    });
    if (!problem.is_first_block()) return;
    problem.for_own_columns([&](int j) {
      const A b = problem.b[j];
      static_cast<A*>(call.gradients.column_marginal)[problem.at_column(j)] = b != 0 ? G_sum[j] / b : A(0);
    });
  }

  // Goes back over all steps and writes all gradients.
  __device__ void differentiate() {
    const bool each_step = problem.measure();
    const int64_t done = call.saved.done[problem.number];
    find_bases(done, each_step);
    int64_t step = done - 1, last_of_base = step;
    const auto load_scalings = [&](bool with_v) {
      for_own_rows([&](int row) { u[row] = u_of(step, row); });
      if (with_v) problem.for_own_columns([&](int j) { v[j] = v_of(step, j); });
    };
    load_base(step);
    load_scalings(true);
    begin();
    while (step > 0) {
      const bool is_first_of_base = makes_base(step);
      back(step, is_first_of_base);
      if (is_first_of_base) add_steps(step, last_of_base);
      --step;
      __syncthreads();  // all have read u and, where they added steps up, the tile
      load_scalings(is_first_of_base);
      if (is_first_of_base && step > 0) {
        last_of_base = step;
        load_base(step);
        __syncthreads();
        if (problem.keeps_tile()) make_tile(0, problem.rows);
      }
    }
    end();
  }
};

// dregularized/dC = P times the upstream gradient, from the potentials, into this block's rows; 0 as other gradients.
template <class T, bool kOnChip, class A = Accumulator<T>>
__device__ void write_envelope(const SinkhornBackward& call, const Problem<T, kOnChip>& problem, A* grad_cost) {
  const A upstream = static_cast<const A*>(call.upstream.regularized)[problem.number];
  problem.for_rows(0, problem.rows, [&](int row) {
    const A f = static_cast<const A*>(call.saved.row_potential)[problem.at_row(row)];
    for (int j = threadIdx.x % kWarp; j < problem.columns; j += kWarp) {
      const A g = static_cast<const A*>(call.saved.column_potential)[problem.at_column(j)];
      const A P = power_of_two(((f - problem.cost(row, j)) + g) * problem.scale);
      grad_cost[int64_t(row) * problem.columns + j] = problem.counts(row, j) ? P * upstream : A(0);
    }
    if (threadIdx.x % kWarp == 0) static_cast<A*>(call.gradients.row_marginal)[problem.at_row(row)] = 0;
  });
  if (!problem.is_first_block()) return;
  problem.for_own_columns([&](int j) {
    static_cast<A*>(call.gradients.column_marginal)[problem.at_column(j)] = 0;
    static_cast<A*>(call.gradients.column_weight)[problem.at_column(j)] = 0;
  });
}

}  // namespace mlot::cuda
