// The gradient of one problem, of every kind and in either domain.
#pragma once

#include "mlot/cpu/sinkhorn_adjoint.h"

namespace mlot::MLOT_ISA {

// One step's adjoint on log-scalings. Q = P_l / b and R = a row of u_l K v_(l-1) / a are made by one exp each and
// divided by their sums, which are 1 but for the rounding of log-scalings as large as range(C) / epsilon.
//
// gradient [m, width] += Q diag(G_bar) + diag(F_bar) R, and G_bar becomes that of the step before. G and G_before are
// [width], F [m]; `own` is S 1 for the last step of all, else null.
template <class A>
static inline void log_step_adjoint(const Problem<A>& p, const Slabs<A>& slabs, const A* F, const A* G,
                                    const A* G_before, const A* own, Buffer<A>& scratch, AdjointScratch<A>& s,
                                    A* gradient) {
  const int64_t width = p.width;
  A *Q = s.softmax.resize(p.m * width), *sums = s.sums.resize(width), *G_bar = s.G_bar.get();
  const auto exp_at = [&](int64_t i, A shift, const A* other, int64_t j) {
    return exp2_negative<A>(at_least_smallest<A>(F[i] - load(p.row(i) + j) * p.scale + load(other + j) - shift));
  };
  slabs.sum(sums, width, scratch, [&](int64_t first, int64_t last, A* partial) {
    for (int64_t i = first; i < last; ++i) {
      for (int64_t j = 0; j < width; j += kWidth<A>) {
        const Vector<A> q = exp_at(i, 0, G, j);
        store(q, Q + i * width + j), store(load(partial + j) + q, partial + j);
      }
    }
  });
  for (int64_t j = 0; j < p.n; ++j) {
    s.marginals.columns[j] += G_bar[j];
    G_bar[j] /= sums[j];
  }
  slabs.sum(sums, width, scratch, [&](int64_t first, int64_t last, A* partial) {
    Buffer<A> buffer;
    A* R = buffer.resize(width);
    for (int64_t i = first; i < last; ++i) {
      const A *q = Q + i * width, shift = A(p.log_a[i]);
      Vector<A> met = {}, total = {};
      for (int64_t j = 0; j < width; j += kWidth<A>) {
        const Vector<A> r = exp_at(i, shift, G_before, j);
        store(r, R + j);
        met += load(q + j) * load(G_bar + j), total += r;
      }
      const A F_bar = (own ? own[i] : A(0)) - sum<A>(met), beta = F_bar / sum<A>(total);
      s.marginals.rows[i] += F_bar;
      A* out = gradient + i * width;
      for (int64_t j = 0; j < width; j += kWidth<A>) {
        const Vector<A> taken = beta * load(R + j);
        store(load(out + j) + load(q + j) * load(G_bar + j) + taken, out + j);
        store(load(partial + j) + taken, partial + j);
      }
    }
  });
  for (int64_t j = 0; j < p.n; ++j) G_bar[j] = -sums[j];
  clear_drift(p, G_bar);
}

// The gradient of a problem that was solved on log-scalings; see scaling_gradient.
template <class A, class Begin, class Consume>
static inline void log_gradient(const Problem<A>& p, const Slabs<A>& slabs, const A* row_history,
                                const A* column_history, int64_t M, int64_t N, int64_t steps, Workspace<A>& work,
                                AdjointScratch<A>& s, const Begin& begin, const Consume& consume) {
  const auto columns_of = [&](int64_t step, A* G) {
    std::fill_n(G, p.width, A(0));
    if (step > 0) p.columns.gather(column_history + (step - 1) * N, G);
  };
  A *F = work.F.resize(p.m), *G = work.G.resize(p.width);
  p.rows.gather(row_history + (steps - 1) * M, F);
  total_columns(p, slabs, F, work.totals, [](int64_t) {});
  plan_of_logarithms(p, slabs, F, work);
  begin(work.plan);
  A* gradient = work.matrix.resize(p.m * p.width);
  slabs.run([&](int64_t, int64_t first, int64_t last) {
    std::vector<A> own(size_t(p.width), A(0));
    for (int64_t i = first; i < last; ++i) {
      gradient_row(p, work.plan, s.plan, i, upstream_row(p, s.plan, i, own.data()), s.plan.zeros.get(), A(1),
                   gradient + i * p.width);
    }
  });
  Buffer<A> before;
  for (int64_t step = steps; step > 0; --step) {
    p.rows.gather(row_history + (step - 1) * M, F);
    columns_of(step, G), columns_of(step - 1, before.resize(p.width));
    for (int64_t j = 0; j < p.n; ++j) G[j] = A(double(G[j]) - p.log_b[j]);
    log_step_adjoint(p, slabs, F, G, before.get(), step == steps ? s.plan.row_sums.get() : nullptr, work.scratch, s,
                     gradient);
  }
  hand_on(p, slabs, gradient, consume);
}

// Problem b's gradients, whose cost is in place: those of the marginals and the weight in full; dl/dC goes, in blocks
// of rows of the problem, to consume(first row, last row, rows [last - first, width]), which may be called by several
// threads at once. `grad_plan` is [M, N] or null. A problem of which nothing counts has no rows.
template <class A, class Consume>
static inline void differentiate(const TransportOptions& options, const TransportUpstream& upstream,
                                 const TransportSaved& saved, const TransportGradients& gradients, int64_t b,
                                 const Slabs<A>& slabs, Workspace<A>& work, AdjointScratch<A>& s, const A* grad_plan,
                                 const Consume& consume) {
  const int64_t M = options.rows, N = options.columns, L = options.iterations;
  const Problem<A>& p = work.problem;
  A *for_rows = static_cast<A*>(gradients.row_marginal) + b * M,
    *for_columns = static_cast<A*>(gradients.column_marginal) + b * N,
    *for_weight = static_cast<A*>(gradients.column_weight) + b * N;
  std::fill_n(for_rows, M, A(0)), std::fill_n(for_columns, N, A(0)), std::fill_n(for_weight, N, A(0));
  if (p.m == 0) return;
  const A transported = static_cast<const A*>(upstream.transported)[b],
          regularized = static_cast<const A*>(upstream.regularized)[b];
  const A* row_potential = static_cast<const A*>(saved.row_potential) + b * M;
  if (options.gradient == TransportGradient::envelope) {
    plan_of_potential(p, slabs, row_potential, work);
    envelope_gradient(p, slabs, work.plan, regularized, consume);
    return;
  }
  const auto begin = [&](const Plan<A>& plan) {
    prepare_gradient(p, plan, transported, regularized, grad_plan, N, s.plan);
    add_up(p, slabs, plan, work.scratch, s.plan);
    std::fill_n(s.marginals.rows.resize(p.m), p.m, A(0));
    std::fill_n(s.marginals.columns.resize(p.width), p.width, A(0));
    std::copy_n(s.plan.column_sums.get(), p.width, s.G_bar.resize(p.width));
  };
  const auto write_weight = [&] {
    std::vector<A> weight(s.plan.moved(p.width), s.plan.moved(p.width) + p.n);
    for (A& w : weight) w *= transported;
    p.columns.scatter(weight.data(), for_weight, N);
  };
  if (options.gradient == TransportGradient::implicit) {
    plan_of_potential(p, slabs, row_potential, work);
    begin(work.plan);
    implicit_gradient(p, slabs, work.plan, s.plan, consume);
    write_weight();
    return;
  }
  if (options.domain != Domain::log) find_extent(p, slabs, work.extent);
  const bool scaled = prefers_scaling(options.domain, double(work.extent.range), p.epsilon);
  const auto unrolled =
      scaled ? scaling_gradient<A, decltype(begin), Consume> : log_gradient<A, decltype(begin), Consume>;
  unrolled(p, slabs, static_cast<const A*>(saved.row_history) + b * L * M,
           static_cast<const A*>(saved.column_history) + b * L * N, M, N, saved.done[b], work, s, begin, consume);
  write_weight();
  // KL's own dependence on the marginals, beside that through the plan, whose columns sum to b.
  const A own = A(p.epsilon) * regularized;
  A *rows = s.marginals.rows.get(), *columns = s.marginals.columns.get();
  for (int64_t i = 0; i < p.m; ++i) rows[i] = (rows[i] - own * s.plan.row_masses[i]) * p.inverse_a[i];
  for (int64_t j = 0; j < p.n; ++j) columns[j] = (columns[j] - own * p.b[j]) * p.inverse_b[j];
  p.rows.scatter(rows, for_rows, M), p.columns.scatter(columns, for_columns, N);
}

}  // namespace mlot::MLOT_ISA
