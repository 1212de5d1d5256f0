// How a loss depends on one problem's plan, and through it on the cost: what all kinds of gradients share.
#pragma once

#include "mlot/cpu/sinkhorn_solve.h"

namespace mlot::MLOT_ISA {

constexpr int64_t kBlockRows = 16;  // of dl/dC, made and handed on while they are in the cache

// W = dl/dP. For <P, C w> it is C w; for the regularised cost C cancels against X in log P, which leaves a term per row
// and one per column:
//
//   W_ij = weight_j C_ij + row_i + column_j + grad_plan_ij          S = W P
//
// dl/dC is direct P - (S less what the steps take back) / epsilon.
template <class A>
struct PlanGradient {
  Buffer<A> weight, direct, row, column;  // [width], but for row: [m]; direct is epsilon times what multiplies P
  Buffer<A> zeros;                        // [width]
  const A* grad_plan;                     // [M, N] or null
  int64_t N;
  A transported, regularized;  // upstream
  // Made by `add_up`: sums of S and of P over rows [m], of S over columns [width], and of P C over columns [width].
  Buffer<A> row_sums, row_masses, column_sums;

  const A* moved(int64_t width) const { return column_sums.get() + width; }
};

template <class A>
static inline void prepare_gradient(const Problem<A>& p, const Plan<A>& plan, A transported, A regularized,
                                    const A* grad_plan, int64_t N, PlanGradient<A>& g) {
  g.transported = transported, g.regularized = regularized, g.grad_plan = grad_plan, g.N = N;
  A *weight = g.weight.resize(p.width), *direct = g.direct.resize(p.width), *column = g.column.resize(p.width);
  std::fill_n(g.zeros.resize(p.width), p.width, A(0));
  const double unit = double(regularized) * p.epsilon;
  A* row = g.row.resize(p.m);
  for (int64_t i = 0; i < p.m; ++i) row[i] = A(unit / kLog2E * (plan.F[i] - p.log_a[i]));
  for (int64_t j = 0; j < p.width; ++j) {
    weight[j] = transported * p.weight[j];
    direct[j] = A(p.epsilon) * (weight[j] + regularized);
    column[j] = j < p.n ? A(unit / kLog2E * (plan.G[j] - p.log_b[j]) + unit) : A(0);
  }
}

// grad_plan's row for row i of the problem, zeros where there is none; `own` [width] may become it.
template <class A>
static inline const A* upstream_row(const Problem<A>& p, const PlanGradient<A>& g, int64_t i, A* own) {
  if (!g.grad_plan) return g.zeros.get();
  p.columns.gather(g.grad_plan + p.rows.index[i] * g.N, own);
  return own;
}

// W at the vector of columns from j on.
template <class A>
MLOT_INLINE Vector<A> gradient_at(const PlanGradient<A>& g, const A* cost, const A* extra, A row, int64_t j) {
  return load(g.weight.get() + j) * load(cost + j) + (row + load(g.column.get() + j)) + load(extra + j);
}

template <class A>
static inline void add_up(const Problem<A>& p, const Slabs<A>& slabs, const Plan<A>& plan, Buffer<A>& scratch,
                          PlanGradient<A>& g) {
  const int64_t width = p.width;
  A *row_sums = g.row_sums.resize(p.m), *row_masses = g.row_masses.resize(p.m);
  slabs.sum(g.column_sums.resize(2 * width), 2 * width, scratch, [&](int64_t first, int64_t last, A* sums) {
    std::vector<A> own(size_t(width), A(0));
    for (int64_t i = first; i < last; ++i) {
      const A *cost = p.row(i), *extra = upstream_row(p, g, i, own.data()), *kernel = plan.kernel + i * width;
      const A u = plan.u[i], row = g.row[i];
      Vector<A> total = {}, mass = {};
      for (int64_t j = 0; j < width; j += kWidth<A>) {
        const Vector<A> carried = u * load(kernel + j) * load(plan.v + j);
        const Vector<A> S = where_carried<A>(carried, carried * gradient_at(g, cost, extra, row, j));
        const Vector<A> moved = where_carried<A>(carried, carried * load(cost + j));
        total += S, mass += carried;
        store(load(sums + j) + S, sums + j);
        store(load(sums + width + j) + moved, sums + width + j);
      }
      row_sums[i] = sum<A>(total), row_masses[i] = sum<A>(mass);
    }
  });
}

// out_j = kernel_ij (u_i v_j (direct_j - W_ij) + taken_j) `unit`: epsilon unit times dl/dC, where the steps take back
// kernel taken / epsilon. 0 where nothing is carried. `out` may be `taken`.
template <class A>
static inline void gradient_row(const Problem<A>& p, const Plan<A>& plan, const PlanGradient<A>& g, int64_t i,
                                const A* extra, const A* taken, A unit, A* out) {
  const A *cost = p.row(i), *kernel = plan.kernel + i * p.width;
  const A u = plan.u[i], row = g.row[i];
  for (int64_t j = 0; j < p.width; j += kWidth<A>) {
    const Vector<A> k = load(kernel + j) * unit;
    const Vector<A> own = load(g.direct.get() + j) - gradient_at(g, cost, extra, row, j);
    store(where_carried<A>(k, k * (u * load(plan.v + j) * own + load(taken + j))), out + j);
  }
}

// body(first row, last row, out) in blocks of rows; `out` [kBlockRows, width] is a thread's own.
template <class A, class Body>
static inline void over_row_blocks(const Problem<A>& p, const Slabs<A>& slabs, const Body& body) {
  slabs.run([&](int64_t, int64_t first, int64_t last) {
    Buffer<A> block;
    A* out = block.resize(kBlockRows * p.width);
    for (int64_t i = first; i < last; i += kBlockRows) body(i, std::min(last, i + kBlockRows), out);
  });
}

// The plan that the potential of the rows makes, for gradients that need nothing of the steps.
template <class A>
static inline void plan_of_potential(const Problem<A>& p, const Slabs<A>& slabs, const A* row_potential,
                                     Workspace<A>& work) {
  A* F = work.F.resize(p.m);
  p.rows.gather(row_potential, F);
  for (int64_t i = 0; i < p.m; ++i) F[i] = A(double(F[i]) * kLog2E / p.epsilon);
  total_columns(p, slabs, F, work.totals, [](int64_t) {});
  plan_of_logarithms(p, slabs, F, work);
}

// dregularized / dC = P.
template <class A, class Consume>
static inline void envelope_gradient(const Problem<A>& p, const Slabs<A>& slabs, const Plan<A>& plan, A regularized,
                                     const Consume& consume) {
  over_row_blocks(p, slabs, [&](int64_t first, int64_t last, A* out) {
    for (int64_t i = first; i < last; ++i) {
      A* row = out + (i - first) * p.width;
      for (int64_t j = 0; j < p.width; ++j) row[j] = regularized * plan.kernel[i * p.width + j];
    }
    consume(first, last, out);
  });
}

// Solves the symmetric system [n, n], of which the lower triangle is given and overwritten, for `right` in place.
// L D L^T: D may have an element that rounding made negative, where the plan carries almost all in single pairs.
static inline void solve_symmetric(std::vector<double>& system, int64_t n, std::vector<double>& right) {
  std::vector<double> scaled(size_t(n), 0);
  for (int64_t k = 0; k < n; ++k) {  // row k of L, by the rows above it
    double* row = system.data() + k * n;
    for (int64_t i = 0; i < k; ++i) {
      const double* above = system.data() + i * n;
      double rest = row[i];
      for (int64_t l = 0; l < i; ++l) rest -= scaled[l] * above[l];
      scaled[i] = rest;  // L_ki D_i
    }
    for (int64_t i = 0; i < k; ++i) {
      row[i] = scaled[i] / system[i * n + i];
      row[k] -= scaled[i] * row[i];
    }
  }
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t i = 0; i < k; ++i) right[k] -= system[k * n + i] * right[i];
  }
  for (int64_t k = 0; k < n; ++k) right[k] /= system[k * n + k];
  for (int64_t k = n - 1; k >= 0; --k) {
    for (int64_t i = 0; i < k; ++i) right[i] -= system[k * n + i] * right[k];
  }
}

// x [m] and y [n] with [diag(P 1), P; P^T, diag(P^T 1)] (x, y) = (S 1, S^T 1) and y orthogonal to the columns' masses,
// through the Schur complement of the rows, in double: the system is ill-conditioned.
template <class A>
static inline void implicit_system(const Problem<A>& p, const Plan<A>& plan, const PlanGradient<A>& g,
                                   std::vector<double>& x, std::vector<double>& y) {
  const int64_t m = p.m, n = p.n;
  std::vector<double> schur(size_t(n * n), 0), mass(size_t(n), 0), P(static_cast<size_t>(n));
  std::vector<A> own(size_t(p.width), A(0));
  x.assign(size_t(m), 0), y.assign(size_t(n), 0);
  for (int64_t i = 0; i < m; ++i) {
    const A *kernel = plan.kernel + i * p.width, *cost = p.row(i), *extra = upstream_row(p, g, i, own.data());
    double r = 0, s = 0;
    for (int64_t j = 0; j < n; ++j) {
      P[j] = double(kernel[j]), r += P[j], mass[j] += P[j];
      const double W = double(g.weight[j]) * cost[j] + (double(g.row[i]) + g.column[j]) + extra[j];
      const double S = P[j] != 0 ? P[j] * W : 0;
      s += S, y[j] += S;
    }
    x[i] = s;
    if (r == 0) continue;
    for (int64_t j = 0; j < n; ++j) {
      const double share = P[j] / r;
      y[j] -= share * s;
      for (int64_t k = 0; k <= j; ++k) schur[j * n + k] -= share * P[k];
    }
  }
  const double total = std::max(std::accumulate(mass.begin(), mass.end(), 0.0), std::numeric_limits<double>::min());
  for (int64_t j = 0; j < n; ++j) {  // singular along 1, which mass mass^T / total fixes at 0
    for (int64_t k = 0; k <= j; ++k) schur[j * n + k] += mass[j] * mass[k] / total;
    schur[j * n + j] += mass[j] == 0 ? 1 : mass[j];
  }
  solve_symmetric(schur, n, y);
  for (int64_t i = 0; i < m; ++i) {
    double r = 0, met = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double carried = double(plan.kernel[i * p.width + j]);
      r += carried, met += carried * y[j];
    }
    x[i] = r == 0 ? 0 : (x[i] - met) / r;
  }
}

template <class A, class Consume>
static inline void implicit_gradient(const Problem<A>& p, const Slabs<A>& slabs, const Plan<A>& plan,
                                     const PlanGradient<A>& g, const Consume& consume) {
  std::vector<double> x, y;
  implicit_system(p, plan, g, x, y);
  over_row_blocks(p, slabs, [&](int64_t first, int64_t last, A* out) {
    std::vector<A> own(size_t(p.width), A(0)), taken(size_t(p.width), A(0));
    for (int64_t i = first; i < last; ++i) {
      for (int64_t j = 0; j < p.n; ++j) taken[j] = A(x[i]) + A(y[j]);
      gradient_row(p, plan, g, i, upstream_row(p, g, i, own.data()), taken.data(), A(1 / p.epsilon),
                   out + (i - first) * p.width);
    }
    consume(first, last, out);
  });
}

}  // namespace mlot::MLOT_ISA
