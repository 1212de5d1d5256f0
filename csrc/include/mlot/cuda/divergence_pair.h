// A pair of rows as row_divergence goes over it: which columns meet, and their probabilities.
#pragma once

#include "mlot/cuda/any_row.h"
#include "mlot/cuda/divergence_terms.h"
#include "mlot/cuda/row_divergence.h"

namespace mlot::cuda {

// Every column meets, and none counts as a floor.
__device__ inline bool is_whole(const DivergenceProblem& problem) {
  return !problem.options.pairs && !problem.sides[0].column_mask && !problem.sides[1].column_mask &&
         problem.options.floor == 0;
}

// How a row's logits become logarithms of its softmax.
template <class B>
struct DivergenceRow {
  B peak, inverse, log_total;

  // Rounded in itself: equal rows are to have equal ones, whether or not they are mixed.
  __device__ B scaled(B x) const { return rounded_product(x - peak, inverse); }

  __device__ B softmax(B x) const { return power_of_two((scaled(x) - log_total) * B(kLog2E)); }
};

// The scalars of a pair, in a block's shared memory, of which each thread has a copy.
template <class B>
struct PairScalars {
  DivergenceRow<B> student, teacher;
  B interpolation;
  B target_log_total;  // of the logits that the student is held against
  TermOptions<B> terms;

  // What the student's logit is held against: where TAID mixes, (1 - t) of its own and t of the teacher's. Equal ones
  // stay the same.
  __device__ B target(B own, B other) const {
    if (interpolation == B(1)) return other;
    const bool absent = own == B(-INFINITY) || other == B(-INFINITY);
    return absent ? B(-INFINITY) : own + interpolation * (other - own);
  }

  // With all scalars of the rows in place; `share` is of B.
  __device__ void set_terms(const DivergenceProblem& problem, int64_t slot, double share) {
    const double of_student = scalar_at(problem.sides[0].log_scale, problem.dtypes[0], slot);
    const double of_teacher = scalar_at(problem.sides[1].log_scale, problem.dtypes[1], slot);
    const bool whole = is_whole(problem);
    const B kappa = B(problem.constants.kappa * (2 * share - 1));  // but for adaptive_kl the share is 1
    terms.scale[0] = B(exp(of_student)), terms.scale[1] = B(exp(of_teacher)), terms.more = B(of_teacher - of_student);
    terms.weight = B(problem.options.kind == DivergenceKind::adaptive_kl ? share : problem.constants.weight);
    terms.kappa = whole ? B(0) : kappa, terms.balance = whole ? kappa : B(0);
    terms.floor = B(problem.options.floor), terms.log_floor = B(problem.log_floor);
    terms.log_scale[0] = B(of_student), terms.log_scale[1] = B(of_teacher);
  }
};

template <class B>
__device__ inline DivergenceRow<B> divergence_row(const LogitsRows& rows, double peak, double scale, double log_total) {
  return {B(peak), B(1 / (rows.temperature * scale)), B(log_total)};
}

// Two columns that meet: what their rows' softmax has, p and q, which are 0 where they are left out, and log(p / q).
template <class B>
struct Meeting {
  B softmax[2], q, p, d;
  bool low[2];  // counts as the floor, which its logit does not move; NaN does not
};

// With kFloors p and q are at least the floor. Where both count as it, as where they are left out, that adds exactly
// nothing.
template <bool kFloors, class B>
__device__ inline Meeting<B> meet(const PairScalars<B>& pair, B x, B y, bool left_out) {
  const B own = pair.student.scaled(x), log_q = own - pair.student.log_total;
  const B other = pair.teacher.scaled(y);
  const B log_p = (kFloors ? other : pair.target(own, other)) - pair.target_log_total;  // no floor where TAID mixes
  Meeting<B> m;
  m.softmax[0] = power_of_two(log_q * B(kLog2E)), m.softmax[1] = power_of_two(log_p * B(kLog2E));
  m.q = left_out ? B(0) : rounded_product(m.softmax[0], pair.terms.scale[0]);
  m.p = left_out ? B(0) : rounded_product(m.softmax[1], pair.terms.scale[1]);
  m.low[0] = kFloors && m.q < pair.terms.floor, m.low[1] = kFloors && m.p < pair.terms.floor;
  B apart = (log_p - log_q) + pair.terms.more;
  if constexpr (kFloors) {
    const B at_q = m.low[0] ? pair.terms.log_floor : log_q + pair.terms.log_scale[0];
    const B at_p = m.low[1] ? pair.terms.log_floor : log_p + pair.terms.log_scale[1];
    apart = at_p - at_q;
    m.q = m.low[0] ? pair.terms.floor : m.q, m.p = m.low[1] ? pair.terms.floor : m.p;
  }
  m.d = m.p + m.q == B(0) ? B(0) : apart;
  return m;
}

template <DivergenceKind kKind, class B>
__device__ inline Term<B> term_of(const Meeting<B>& m, const TermOptions<B>& o) {
  const Term<B> term = term_of<kKind>(m.q, m.p, m.d, o);
  return {term.loss, {m.low[0] ? B(0) : term.H[0], m.low[1] ? B(0) : term.H[1]}};
}

// Neighbouring columns, or pairs of columns, of one thread; logits of -inf behind the last one.
template <class B>
struct ColumnTile {
  B x[kColumnsAtOnce<B>], y[kColumnsAtOnce<B>];
  unsigned left_out = 0;  // a bit for each

  __device__ bool leaves_out(int i) const { return left_out >> i & 1; }
};

// Columns from `first` on, which may lie in front of the row.
template <class B>
__device__ inline ColumnTile<B> read_columns(const DivergenceProblem& problem, const AnyRow<B>& student,
                                             const AnyRow<B>& teacher, int64_t first) {
  ColumnTile<B> tile;
  const int64_t end = problem.sides[0].vocab_size;
  load(&student, first, end, B(-INFINITY), tile.x);
  load(&teacher, first, end, B(-INFINITY), tile.y);
#pragma unroll
  for (const bool* mask : {problem.sides[0].column_mask, problem.sides[1].column_mask}) {
    if (!mask) continue;
#pragma unroll
    for (int i = 0; i < kColumnsAtOnce<B>; ++i) {
      const int64_t column = first + i;
      if (column >= 0 && column < end && !mask[column]) tile.left_out |= 1u << i;
    }
  }
  return tile;
}

// What pair number i meets: NaN where a column does not exist, which shows though the other may be left out.
template <class B>
struct MetByPair {
  B x, y;
  bool left_out;

  __device__ MetByPair(const DivergenceProblem& problem, const AnyRow<B>& student, const AnyRow<B>& teacher,
                       int64_t i) {
    const LogitsRows &s = problem.sides[0], &t = problem.sides[1];
    const int64_t own = problem.options.pairs[2 * i], other = problem.options.pairs[2 * i + 1];
    x = read_column(student, own, s.vocab_size);
    y = read_column(teacher, other, t.vocab_size);
    const bool exist = own >= 0 && own < s.vocab_size && other >= 0 && other < t.vocab_size;
    left_out = exist && ((s.column_mask && !s.column_mask[own]) || (t.column_mask && !t.column_mask[other]));
  }
};

// Calls use(tile) for this thread's share of the columns that meet, or of the pairs. It finds the rows of the slot by
// itself: kept from one reading of them to the next they would take registers in between.
template <bool kPairs, class B, class Use>
__device__ inline void for_tiles(const DivergenceProblem& problem, int64_t slot, Use use) {
  const AnyRow<B> student = any_row<B>(problem.sides[0], problem.dtypes[0], slot);
  const AnyRow<B> teacher = any_row<B>(problem.sides[1], problem.dtypes[1], slot);
  constexpr int n = kColumnsAtOnce<B>;
  const int64_t end = kPairs ? problem.options.pair_count : problem.sides[0].vocab_size;
  const int64_t stride = int64_t(cluster_size()) * blockDim.x * n;
#pragma unroll 1
  for (int64_t first = (int64_t(cluster_rank()) * blockDim.x + threadIdx.x) * n; first < end; first += stride) {
    if constexpr (kPairs) {
      ColumnTile<B> tile;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        tile.x[i] = tile.y[i] = B(-INFINITY);
        if (first + i >= end) continue;
        const MetByPair<B> met(problem, student, teacher, first + i);
        tile.x[i] = met.x, tile.y[i] = met.y, tile.left_out |= unsigned(met.left_out) << i;
      }
      use(tile);
    } else {
      use(read_columns(problem, student, teacher, first));
    }
  }
}

}  // namespace mlot::cuda
