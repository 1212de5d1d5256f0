// One problem solved: its steps in the domain that suits it, its values, and what its backward will need.
#pragma once

#include "mlot/cpu/sinkhorn_scaling.h"

namespace mlot::MLOT_ISA {

// P_ij = u_i kernel_ij v_j, and log2 P = F + X + G where it is not 0.
template <class A>
struct Plan {
  const A* kernel;           // [m, width]
  const A *u, *v;            // [m], [width]
  std::vector<double> F, G;  // [m], [n]

  void row(int64_t i, int64_t width, A* out) const {
    for (int64_t j = 0; j < width; j += kWidth<A>) store(load(kernel + i * width + j) * u[i] * load(v + j), out + j);
  }
};

// What a thread needs for one problem after the other.
template <class A>
struct Workspace {
  Problem<A> problem;
  Segment<A> segment;
  Extent<A> extent;
  ColumnTotals<A> totals;
  Plan<A> plan;
  Buffer<A> u, v, sums, scratch, F, G, matrix;
};

// Rows of one problem's histories, of A: [L, M] and [L, N].
template <class A>
struct HistoryWriter {
  const Problem<A>& p;
  A *rows, *columns;  // null where nothing is kept
  int64_t M, N;

  void operator()(int64_t step, const A* row, const A* column) const {
    if (!rows) return;
    p.rows.scatter(row, rows + (step - 1) * M, M);
    p.columns.scatter(column, columns + (step - 1) * N, N);
  }

  void clear(int64_t first, int64_t last) const {
    if (!rows) return;
    std::fill(rows + first * M, rows + last * M, A(0)), std::fill(columns + first * N, columns + last * N, A(0));
  }
};

// The plan of a problem that was solved on scalings.
template <class A>
static inline void plan_of_scalings(const Problem<A>& p, const Segment<A>& segment, const A* u, const A* v,
                                    Plan<A>& plan) {
  plan.kernel = segment.kernel.get(), plan.u = u, plan.v = v;
  plan.F.resize(p.m), plan.G.resize(p.n);
  for (int64_t i = 0; i < p.m; ++i) plan.F[i] = segment.F(i, u[i]);
  for (int64_t j = 0; j < p.n; ++j) plan.G[j] = segment.G(j, v[j]);
}

// The plan after the column step that belongs to F, whose column totals are given, written in full.
template <class A>
static inline void plan_of_logarithms(const Problem<A>& p, const Slabs<A>& slabs, const A* F, Workspace<A>& work) {
  A* kernel = work.segment.kernel.resize(p.m * p.width);
  log_plan(p, slabs, F, work.totals, work.sums, kernel);
  A *u = work.u.resize(p.m), *v = work.v.resize(p.width);
  std::fill_n(u, p.m, A(1)), std::fill_n(v, p.n, A(1)), std::fill(v + p.n, v + p.width, A(0));
  Plan<A>& plan = work.plan;
  plan.kernel = kernel, plan.u = u, plan.v = v;
  plan.F.assign(F, F + p.m), plan.G.resize(p.n);
  for (int64_t j = 0; j < p.n; ++j) plan.G[j] = log_column(p, work.totals, j);
}

// Steps on log-scalings, as scale_steps; keep(step, F, G).
template <class A, class Keep>
static inline int64_t log_steps(const Problem<A>& p, const Slabs<A>& slabs, int64_t iterations, double tolerance,
                                Workspace<A>& work, const Keep& keep) {
  A *F = work.F.resize(p.m), *G = work.G.resize(p.width);
  std::fill_n(G, p.width, A(0));
  for (int64_t step = 1;; ++step) {
    log_step(p, slabs, G, F, work.totals);
    bool done = tolerance > 0;
    for (int64_t j = 0; j < p.n; ++j) {
      const A next = A(log_column(p, work.totals, j));
      done = done && std::abs(double(next) - double(G[j])) <= tolerance * kLog2E;
      G[j] = next;
    }
    keep(step, F, G);
    if (done || step == iterations) return step;
  }
}

// <P, C w>, and <P, C> + epsilon KL(P | a b^T) without it. In the latter C cancels against X within log P, which leaves
// epsilon (sum_i r_i (F_i - log a_i) + sum_j b_j (G_j - log b_j)) for the rows' sums r; the columns' are b.
template <class A>
static inline void transport_values(const Problem<A>& p, const Slabs<A>& slabs, const Plan<A>& plan,
                                    double* transported, double* regularized) {
  std::vector<double> moved(size_t(slabs.count()), 0), surprise(size_t(slabs.count()), 0);
  slabs.run([&](int64_t slab, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const A *kernel = plan.kernel + i * p.width, *cost = p.row(i);
      Vector<A> row_sum[2] = {}, row_moved[2] = {};
      for (int64_t j = 0; j < p.width; j += 2 * kWidth<A>) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const int64_t k = j + h * kWidth<A>;
          const Vector<A> carried = load(kernel + k) * load(plan.v + k);
          row_sum[h] += carried;
          row_moved[h] += where_carried<A>(carried, carried * load(cost + k) * load(p.weights() + k));
        }
      }
      const double u = double(plan.u[i]);
      moved[slab] += u * double(sum<A>(row_moved[0] + row_moved[1]));
      surprise[slab] += u * double(sum<A>(row_sum[0] + row_sum[1])) * (plan.F[i] - p.log_a[i]);
    }
  });
  double of_columns = 0;
  for (int64_t j = 0; j < p.n; ++j) of_columns += double(p.b[j]) * (plan.G[j] - p.log_b[j]);
  *transported = std::accumulate(moved.begin(), moved.end(), 0.0);
  *regularized = p.epsilon / kLog2E * (std::accumulate(surprise.begin(), surprise.end(), 0.0) + of_columns);
}

template <class A>
static inline void write_plan(const Problem<A>& p, const Slabs<A>& slabs, const Plan<A>& plan, A* out, int64_t M,
                              int64_t N) {
  if (p.m < M) std::fill_n(out, M * N, A(0));
  slabs.run([&](int64_t, int64_t first, int64_t last) {
    std::vector<A> row(size_t(p.width), A(0));
    for (int64_t i = first; i < last; ++i) {
      plan.row(i, p.width, row.data());
      p.columns.scatter(row.data(), out + p.rows.index[i] * N, N);
    }
  });
}

// All outputs of problem b, whose cost is in place. `plan` is [M, N] or null.
template <class A>
static inline void solve(const TransportOptions& options, const TransportOutputs& outputs, int64_t b,
                         const Slabs<A>& slabs, Workspace<A>& work, A* plan) {
  const int64_t M = options.rows, N = options.columns, L = options.iterations;
  const Problem<A>& p = work.problem;
  const auto at = [b](void* values, int64_t each) { return values ? static_cast<A*>(values) + b * each : nullptr; };
  const HistoryWriter<A> history{p, at(outputs.row_history, L * M), at(outputs.column_history, L * N), M, N};
  A &transported = *at(outputs.transported, 1), &regularized = *at(outputs.regularized, 1);
  A *row_potential = at(outputs.row_potential, M), *column_potential = at(outputs.column_potential, N);
  int64_t& done = outputs.done[b];
  if (p.m == 0) {
    transported = regularized = 0;
    done = options.tolerance > 0 ? 1 : L;
    std::fill_n(row_potential, M, A(0)), std::fill_n(column_potential, N, A(0));
    history.clear(0, L);
    if (plan) std::fill_n(plan, M * N, A(0));
    return;
  }
  if (options.domain != Domain::log) find_extent(p, slabs, work.extent);
  if (prefers_scaling(options.domain, double(work.extent.range), p.epsilon)) {
    A *u = work.u.resize(p.m), *v = work.v.resize(p.width), *sums = work.sums.resize(p.width);
    work.segment.start(p, slabs, work.extent);
    done = scale_steps(p, slabs, L, options.tolerance, work.segment, work.scratch, u, v, sums, history);
    plan_of_scalings(p, work.segment, u, v, work.plan);
  } else {
    done = log_steps(p, slabs, L, options.tolerance, work, history);
    plan_of_logarithms(p, slabs, work.F.get(), work);
  }
  history.clear(done, L);
  double values[2];
  transport_values(p, slabs, work.plan, values, values + 1);
  transported = A(values[0]), regularized = A(values[1]);
  const double unit = p.epsilon / kLog2E;
  std::vector<A> potential(size_t(std::max(p.m, p.n)));
  for (int64_t i = 0; i < p.m; ++i) potential[i] = A(unit * work.plan.F[i]);
  p.rows.scatter(potential.data(), row_potential, M);
  for (int64_t j = 0; j < p.n; ++j) potential[j] = A(unit * work.plan.G[j]);
  p.columns.scatter(potential.data(), column_potential, N);
  if (plan) write_plan(p, slabs, work.plan, plan, M, N);
}

}  // namespace mlot::MLOT_ISA
