// The exact derivative of the steps that one problem took, in reverse.
//
// A step's adjoint is a sweep like the step itself, and what all steps add to dl/dC is one product of matrices per
// segment (README): with alpha_l = G_bar_l v_l / b and beta_l = F_bar_l u_l / a,
//
//   K_ij sum_l (u_l,i alpha_l,j + beta_l,i v_(l-1),j) / epsilon
#pragma once

#include <tuple>
#include <utility>

#include "mlot/cpu/sinkhorn_gradient.h"

namespace mlot::MLOT_ISA {

// Sums over the steps of F_bar and G_bar, which are the gradients of log a and log b: [m] and [width].
template <class A>
struct MarginalGradient {
  Buffer<A> rows, columns;
};

// Pairs of vectors whose outer products are added up, one row each: left [2 D, rows], right [2 D, width]. Step l has
// the rows 2 l - 2: u_l and alpha_l, v_l until it is made; and 2 l - 1: beta_l and v_(l-1).
template <class A>
struct Terms {
  Buffer<A> left, right, left_panels, right_panels;
  int64_t rows, width;

  A* left_of(int64_t term) const { return left.get() + term * rows; }
  A* right_of(int64_t term) const { return right.get() + term * width; }
};

constexpr int kPanelRows = kVectorBytes == 64 ? 8 : 4;  // whose sums with two vectors of columns fit the registers

// Rows of [count, width] side by side in groups, [width / group, count, group]: a tile of the product reads on end.
template <class A>
static inline void pack(const A* matrix, int64_t count, int64_t width, int64_t group, A* panels) {
  for (int64_t j = 0; j < width; j += group) {
    for (int64_t k = 0; k < count; ++k) {
      std::copy_n(matrix + k * width + j, group, panels + j * count + k * group);
    }
  }
}

// kPanelRows rows of the product of `count` terms, into out [kPanelRows, width].
template <class A>
static inline void product_rows(const A* left, const A* right, int64_t count, int64_t width, A* out) {
  constexpr int R = kPanelRows, W = kWidth<A>;
  for (int64_t j = 0; j < width; j += 2 * W) {
    const A* columns = right + j * count;
    Vector<A> total[R][2] = {};
    for (int64_t k = 0; k < count; ++k) {
      const Vector<A> first = load(columns + k * 2 * W), second = load(columns + k * 2 * W + W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const A factor = left[k * R + r];
        total[r][0] += factor * first, total[r][1] += factor * second;
      }
    }
    for (int r = 0; r < R; ++r) {
      store(total[r][0], out + r * width + j), store(total[r][1], out + r * width + j + W);
    }
  }
}

// What a problem's adjoint works in.
template <class A>
struct AdjointScratch {
  PlanGradient<A> plan;
  MarginalGradient<A> marginals;
  Terms<A> terms;
  Buffer<A> G_bar, sums, gradient, softmax;
};

// G_bar [width] of every step but the last sums to 0, and what rounding leaves of that sum would stay, in the direction
// of b, through all steps before: hundreds of them would add it up.
template <class A>
static inline void clear_drift(const Problem<A>& p, A* G_bar) {
  double sum = 0, mass = 0;
  for (int64_t j = 0; j < p.n; ++j) sum += double(G_bar[j]), mass += double(p.b[j]);
  const A share = A(sum / mass);
  for (int64_t j = 0; j < p.n; ++j) G_bar[j] -= share * p.b[j];
}

// The steps of one segment, last to first, on its kernel; G_bar becomes that of the step before, and the terms
// complete. `u_bar` is S 1 for the last step of all.
template <class A>
static inline void segment_adjoint(const Problem<A>& p, const Slabs<A>& slabs, int64_t first_step, int64_t last_step,
                                   bool last_of_all, Segment<A>& segment, Buffer<A>& scratch, AdjointScratch<A>& s) {
  A *G_bar = s.G_bar.get(), *sums = s.sums.resize(p.width);
  for (int64_t step = last_step; step >= first_step; --step) {
    A *alpha = s.terms.right_of(2 * step - 2), *beta = s.terms.left_of(2 * step - 1);
    const A *u = s.terms.left_of(2 * step - 2), *v_before = s.terms.right_of(2 * step - 1);
    for (int64_t j = 0; j < p.width; ++j) {
      alpha[j] = G_bar[j] * alpha[j] * p.inverse_b[j];
      s.marginals.columns[j] += G_bar[j];
    }
    const A* own = last_of_all && step == last_step ? s.plan.row_sums.get() : nullptr;
    A* rows = s.marginals.rows.get();
    const auto row = [&]<int R>(int64_t i, const A* dots, A* scales) {
      const Few<A, R> scale(u + i), inverse(p.inverse_a.get() + i);
      Few<A, R> F_bar(dots), sum(rows + i);
      F_bar.values *= -scale.values;
      if (own) F_bar.values += Few<A, R>(own + i).values;
      sum.values += F_bar.values, sum.store(rows + i);
      F_bar.values *= scale.values * inverse.values;
      F_bar.store(beta + i), F_bar.store(scales);
    };
    sweep(segment.kernel.get(), p.width, alpha, slabs, scratch, sums, []<int R>(int64_t) {}, row);
    for (int64_t j = 0; j < p.width; ++j) G_bar[j] = -v_before[j] * sums[j];
    clear_drift(p, G_bar);
  }
}

// Terms from the histories [L, M] and [L, N] of `steps` steps; returns the steps after which the kernel was made anew.
template <class A>
static inline std::vector<int64_t> read_terms(const Problem<A>& p, const A* row_history, const A* column_history,
                                              int64_t M, int64_t N, int64_t steps, Terms<A>& terms) {
  terms.rows = (p.m + kPanelRows - 1) / kPanelRows * kPanelRows, terms.width = p.width;
  terms.left.resize(2 * steps * terms.rows), terms.right.resize(2 * steps * terms.width);
  std::vector<int64_t> absorbed;
  for (int64_t step = 1; step <= steps; ++step) {
    A *u = terms.left_of(2 * step - 2), *beta = u + terms.rows, *v = terms.right_of(2 * step - 2);
    p.rows.gather(row_history + (step - 1) * M, u), p.columns.gather(column_history + (step - 1) * N, v);
    std::fill(u + p.m, u + terms.rows, A(0)), std::fill_n(beta, terms.rows, A(0));
    std::fill(v + p.n, v + p.width, A(0));
    if (step == steps) break;
    A* v_before_next = terms.right_of(2 * step + 1);
    std::copy_n(v, p.width, v_before_next);
    if (must_absorb(u, p.m, v, p.n)) {
      absorbed.push_back(step);
      std::fill_n(v_before_next, p.n, A(1));
    }
  }
  return absorbed;
}

// out [m, width] += epsilon times what the steps of a segment add to dl/dC; `terms` are theirs, from `term` on.
template <class A, class Finish>
static inline void add_terms(const Problem<A>& p, const Slabs<A>& slabs, Terms<A>& terms, int64_t term, int64_t count,
                             const Finish& finish) {
  A *left = terms.left_panels.resize(count * terms.rows), *right = terms.right_panels.resize(count * terms.width);
  pack(terms.left_of(term), count, terms.rows, kPanelRows, left);
  pack(terms.right_of(term), count, terms.width, 2 * kWidth<A>, right);
  over_row_blocks(p, slabs, [&](int64_t first, int64_t last, A* out) {
    for (int64_t i = first; i < last; i += kPanelRows) {
      product_rows(left + i * count, right, count, p.width, out + (i - first) * p.width);
    }
    finish(first, last, out);
  });
}

// v_0 in the first kernel's coordinates, where it is a normal number; else 0, and the term is added by itself.
template <class A>
static inline bool first_columns(const Problem<A>& p, const Segment<A>& segment, A* v) {
  std::fill_n(v, p.width, A(0));
  if (!segment.from_rows()) return false;
  for (int64_t j = 0; j < p.n; ++j) v[j] = 1 / segment.column_factor[j];
  return true;
}

// out [width] += beta 2^(F + X) for row i of step 1.
template <class A>
static inline void add_first_rows(const Problem<A>& p, const Segment<A>& segment, int64_t i, A beta, A* out) {
  const A F = A(segment.F(i, 1));
  for (int64_t j = 0; j < p.width; j += kWidth<A>) {
    const Vector<A> t = F - load(p.row(i) + j) * p.scale;
    store(load(out + j) + beta * exp2_negative<A>(at_least_smallest<A>(t)), out + j);
  }
}

// dl/dC from epsilon times it.
template <class A, class Consume>
static inline void hand_on(const Problem<A>& p, const Slabs<A>& slabs, const A* gradient, const Consume& consume) {
  over_row_blocks(p, slabs, [&](int64_t first, int64_t last, A* out) {
    const A unit = A(1 / p.epsilon);
    const A* rows = gradient + first * p.width;
    for (int64_t k = 0; k < (last - first) * p.width; ++k) out[k] = rows[k] * unit;
    consume(first, last, out);
  });
}

// The gradient of a problem that was solved on scalings; `begin(plan)` is called once the plan is there, and before
// anything else is read of `s`. All in work's segment: the kernel of each segment is made once more, last one first.
template <class A, class Begin, class Consume>
static inline void scaling_gradient(const Problem<A>& p, const Slabs<A>& slabs, const A* row_history,
                                    const A* column_history, int64_t M, int64_t N, int64_t steps, Workspace<A>& work,
                                    AdjointScratch<A>& s, const Begin& begin, const Consume& consume) {
  Segment<A>& segment = work.segment;
  const std::vector<int64_t> absorbed = read_terms(p, row_history, column_history, M, N, steps, s.terms);
  segment.start(p, slabs, work.extent);
  std::vector<std::pair<std::vector<double>, std::vector<double>>> bases;  // of the segments after the first
  for (const int64_t step : absorbed) {
    segment.absorb(p, s.terms.left_of(2 * step - 2), s.terms.right_of(2 * step - 2));
    bases.emplace_back(segment.row_base, segment.column_base);
  }
  if (absorbed.empty()) {
    segment.complete(p, slabs);
  } else {
    segment.rebuild(p, slabs);
  }
  A *u = work.u.resize(p.m), *v = work.v.resize(p.width);
  std::copy_n(s.terms.left_of(2 * steps - 2), p.m, u), std::copy_n(s.terms.right_of(2 * steps - 2), p.width, v);
  plan_of_scalings(p, segment, u, v, work.plan);
  begin(work.plan);

  A* gradient = nullptr;  // [m, width], where several segments add to it
  const int64_t segments = int64_t(absorbed.size()) + 1;
  for (int64_t index = segments - 1; index >= 0; --index) {
    const int64_t first = index == 0 ? 1 : absorbed[index - 1] + 1,
                  last = index == segments - 1 ? steps : absorbed[index];
    if (index < segments - 1) {
      if (index == 0) {
        segment.start(p, slabs, work.extent);
        segment.complete(p, slabs);
      } else {
        std::tie(segment.row_base, segment.column_base) = bases[index - 1];
        segment.rebuild(p, slabs);
      }
    }
    const bool in_one = index == 0 ? first_columns(p, segment, s.terms.right_of(1)) : true;
    segment_adjoint(p, slabs, first, last, index == segments - 1, segment, work.scratch, s);
    const bool alone = segments == 1 && in_one;
    if (!alone && !gradient) gradient = work.matrix.resize(p.m * p.width);
    add_terms(p, slabs, s.terms, 2 * first - 2, 2 * (last - first + 1), [&](int64_t from, int64_t to, A* out) {
      std::vector<A> own(size_t(p.width), A(0));
      for (int64_t i = from; i < to; ++i) {
        A *row = out + (i - from) * p.width, *total = alone ? row : gradient + i * p.width;
        if (index == segments - 1) {
          const A unit = alone ? A(1 / p.epsilon) : A(1);
          gradient_row(p, work.plan, s.plan, i, upstream_row(p, s.plan, i, own.data()), row, unit, total);
        } else {
          const A* kernel = segment.kernel.get() + i * p.width;
          for (int64_t j = 0; j < p.width; ++j) total[j] += kernel[j] * row[j];
        }
        if (index == 0 && !in_one) add_first_rows(p, segment, i, s.terms.left_of(1)[i], total);
      }
      if (alone) consume(from, to, out);
    });
  }
  if (gradient) hand_on(p, slabs, gradient, consume);
}

}  // namespace mlot::MLOT_ISA
