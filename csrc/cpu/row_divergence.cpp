// row_divergence on a CPU; compiled once per instruction set.
#include "mlot/cpu/row_divergence.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "mlot/cpu/divergence_pair.h"
#include "mlot/cpu/row_gradient.h"
#include "mlot/cpu/row_statistics.h"

namespace mlot::MLOT_ISA {
namespace {

template <class A>
A* at(void* scalars, int64_t slot) {
  return static_cast<A*>(scalars) + slot;
}
template <class A>
A at(const void* scalars, int64_t slot) {
  return static_cast<const A*>(scalars)[slot];
}

// Reads a row's logits once from memory, for its scalars. Returns E[x - peak].
template <class T, class A = Accumulator<T>>
A begin_row(DivergenceRow<T>& row, const DivergenceSaved<void*>& saved, int64_t slot) {
  const LogitsRows& rows = *row.rows;
  const TemperaturePair alone{0, -1, 1};
  ExponentialSums sums;
  A expected;
  const RowStatistics<A> made = row_statistics(row.x, rows.vocab_size, rows.standardize, rows.temperatures, 1, &alone,
                                               1, &sums, &row.log_total, &expected, 1, static_cast<A*>(nullptr));
  row.peak = made.peak, row.inverse = A(1 / (rows.temperatures[0] * double(made.scale)));
  row.log_scale = rows.log_scale ? double(at<A>(rows.log_scale, slot)) : 0;
  *at<A>(saved.peak, slot) = made.peak, *at<A>(saved.log_total, slot) = row.log_total;
  *at<A>(saved.mean, slot) = made.mean, *at<A>(saved.scale, slot) = made.scale;
  *at<A>(saved.slope, slot) = made.slope;
  return expected;
}

// sum H (x - peak) of a chunk; nothing is at -inf.
template <class B, class T, class A = Accumulator<T>>
double moment_of(const DivergenceRow<T>& row, const Columns& columns, int side, int64_t first, int64_t n, const B* H) {
  B below[kTermColumns];
  read(row, columns, side, first, n, A(1), A(0), below);
  double moment = 0;
  for (int64_t i = 0; i < n; ++i) moment += below[i] == B(-INFINITY) ? 0 : double(H[i]) * double(below[i]);
  return moment;
}

// Owns a slot: reads both rows once from memory and again, out of a cache, for their terms.
template <class S, class T, class B>
void forward_pair(const RowDivergenceForward& call, const S* x, const T* y, int64_t slot) {
  RowPair<S, T> pair(call.sides, call.options, x, y);
  TermChunk<B> chunk;
  double expected[2] = {begin_row(pair.student, call.saved[0], slot), begin_row(pair.teacher, call.saved[1], slot)};
  pair.target_log_total = B(pair.teacher.log_total);
  const bool mixes = call.options.interpolation < 1;
  if (mixes) {  // both in one way: equal rows are to have equal ones
    const int64_t columns = pair.columns.size;
    const auto mix = [&](int64_t first, int64_t n) { pair.mix(chunk, first, n); };
    pair.target_log_total = log_total_of(columns, chunk.log_softmax[1], mix);
    const auto own = [&](int64_t first, int64_t n) {
      read(pair.student, pair.columns, 0, first, n, pair.student.inverse, Accumulator<S>(0), chunk.log_softmax[0]);
    };
    pair.student.log_total = Accumulator<S>(log_total_of(columns, chunk.log_softmax[0], own));
    *at<Accumulator<S>>(call.saved[0].log_total, slot) = pair.student.log_total;
  }
  pair.set_options(1);
  double share = 1;
  if (call.options.kind == DivergenceKind::adaptive_kl) {
    share = share_of_forward(pair, chunk);
    pair.set_options(share);
  }
  double loss = 0, total[2] = {}, moment[2] = {}, of_target = 0;
  pair.for_chunks(chunk, [&](int64_t first, int64_t n) {
    const TermSums<B> sums = pair.add(chunk, n, pair.of_terms);
    loss += double(sums.loss), total[0] += double(sums.H[0]), total[1] += double(sums.H[1]);
    if (call.sides[0].standardize) moment[0] += moment_of(pair.student, pair.columns, 0, first, n, chunk.H[0]);
    if (!call.sides[1].standardize) return;
    moment[1] += moment_of(pair.teacher, pair.columns, 1, first, n, chunk.H[1]);
    if (mixes) of_target += moment_of(pair.teacher, pair.columns, 1, first, n, chunk.softmax[1]);
  });
  if (mixes) expected[1] = of_target;
  *at<B>(call.loss, slot) = B(loss + pair.mass_difference), *at<B>(call.share, slot) = B(share);
  *at<B>(call.target_log_total, slot) = pair.target_log_total;
  *at<Accumulator<S>>(call.saved[0].total, slot) = Accumulator<S>(total[0]);
  *at<Accumulator<T>>(call.saved[1].total, slot) = Accumulator<T>(total[1]);
  *at<Accumulator<S>>(call.saved[0].moment, slot) = Accumulator<S>(moment[0] - total[0] * expected[0]);
  *at<Accumulator<T>>(call.saved[1].moment, slot) = Accumulator<T>(moment[1] - total[1] * expected[1]);
}

template <class A>
void write_nothing(const DivergenceSaved<void*>& saved, int64_t slot) {
  for (void* scalars : {saved.peak, saved.log_total, saved.mean, saved.scale, saved.slope, saved.total, saved.moment}) {
    *at<A>(scalars, slot) = 0;
  }
}

template <class S, class T, class B = Wider<S, T>>
void forward(const RowDivergenceForward& call, const Parallel& parallel) {
  const LogitsRows &student = call.sides[0], &teacher = call.sides[1];
  const int64_t most = std::max(student.vocab_size, teacher.vocab_size);
  parallel(student.all_slots(), worth_a_thread(2 * most), [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) {
      const S* x = row_of<S>(student, slot);
      const T* y = row_of<T>(teacher, slot);
      if (x && y) {
        forward_pair<S, T, B>(call, x, y, slot);
        continue;
      }
      write_nothing<Accumulator<S>>(call.saved[0], slot), write_nothing<Accumulator<T>>(call.saved[1], slot);
      *at<B>(call.loss, slot) = x || y ? B(NAN) : B(0);  // one row alone is no pair
      *at<B>(call.share, slot) = *at<B>(call.target_log_total, slot) = 0;
    }
  });
}

template <class T, class A = Accumulator<T>>
void restore(DivergenceRow<T>& row, const DivergenceSaved<const void*>& saved, int64_t slot) {
  row.peak = at<A>(saved.peak, slot), row.log_total = at<A>(saved.log_total, slot);
  row.inverse = A(1 / (row.rows->temperatures[0] * double(at<A>(saved.scale, slot))));
  row.log_scale = row.rows->log_scale ? double(at<A>(row.rows->log_scale, slot)) : 0;
}

// Owns a row of one side's gradient: reads both rows once, writes it once.
template <int kSide, class S, class T, class B>
void backward_pair(const RowDivergenceBackward& call, const S* x, const T* y, int64_t slot,
                   std::conditional_t<kSide == 0, S, T>* out) {
  using Own = std::conditional_t<kSide == 0, S, T>;
  using A = Accumulator<Own>;
  RowPair<S, T> pair(call.sides, call.options, x, y);
  restore(pair.student, call.saved[0], slot), restore(pair.teacher, call.saved[1], slot);
  pair.target_log_total = at<B>(call.target_log_total, slot);
  const double share = at<B>(call.share, slot);
  pair.set_options(share);
  const auto& own = [&]() -> auto& {
    if constexpr (kSide == 0) {
      return pair.student;
    } else {
      return pair.teacher;
    }
  }();
  const auto& saved = call.saved[kSide];
  const double upstream = double(at<A>(call.grad[kSide], slot)), temperature = own.rows->temperatures[0];
  const double grad = upstream * (kSide == 1 ? call.options.interpolation : 1), total = at<A>(saved.total, slot);
  const double slope = at<A>(saved.slope, slot);
  const A through = slope == 0 ? A(0) : A(slope * grad * double(at<A>(saved.moment, slot)) / temperature);
  const A mean = at<A>(saved.mean, slot);
  const B part = B(grad * double(own.inverse)), sum = B(total);
  const int64_t vocab_size = own.rows->vocab_size;
  TermChunk<B> chunk;
  std::vector<B> dense(pair.options.pairs ? vocab_size : 0);
  if (pair.options.pairs) {
    pair.for_chunks(chunk, [&](int64_t first, int64_t n) {
      pair.add(chunk, n, pair.of_terms);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t column = pair.columns.of(kSide, first + i);
        if (column >= 0 && column < vocab_size) dense[column] += chunk.H[kSide][i];
      }
    });
  }
  const DivergenceOptions no_pairs{pair.options.kind, 0, 0, 0, 1, 0, nullptr, 0};
  const Columns every{no_pairs, vocab_size};
  for (int64_t first = 0; first < vocab_size; first += kTermColumns) {
    const int64_t n = std::min(kTermColumns, vocab_size - first);
    const B* H = dense.data() + first;
    if (!pair.options.pairs) {
      pair.load(chunk, first, n);
      pair.add(chunk, n, pair.of_terms);
      H = chunk.H[kSide];
    }
    B* softmax = chunk.softmax[kSide];
    if (!pair.every_meets) {  // of all columns, not only of those that meet
      B log_softmax[kTermColumns];
      if (kSide == 1 && pair.options.interpolation < 1) {
        pair.mix(chunk, first, n);
        for (int64_t i = 0; i < n; ++i) log_softmax[i] = chunk.log_softmax[1][i] - pair.target_log_total;
      } else {
        read(own, every, kSide, first, n, own.inverse, own.log_total, log_softmax);
      }
      for (int64_t i = 0; i < n; ++i) softmax[i] = exp_negative(log_softmax[i]);
    }
    for (int64_t i = 0; i < n; ++i) {
      const A below = wide(own.x[first + i]) - own.peak;
      A dx = A((H[i] - softmax[i] * sum) * part);
      if (through != 0) dx -= (below - mean) * through;
      narrow(below == A(-INFINITY) ? A(0) : dx, out[first + i]);
    }
  }
  const double kappa = pair.whole ? constants_of(call.options, share).kappa * (kSide == 1 ? 1 : -1) : 0;
  *at<A>(call.grad_log_scale[kSide], slot) = A(upstream * (total + kappa * std::exp(own.log_scale)));
}

template <int kSide, class S, class T, class B>
void backward_side(const RowDivergenceBackward& call, const Parallel& parallel) {
  using Own = std::conditional_t<kSide == 0, S, T>;
  const LogitsRows& rows = call.sides[kSide];
  if (!call.grad_values[kSide]) return;
  std::fill_n(at<Accumulator<Own>>(call.grad_log_scale[kSide], 0), rows.all_slots(), Accumulator<Own>(0));
  write_rows<Own>(rows, call.grad_values[kSide], parallel, [&](int64_t slot, Own* out) {
    const S* x = row_of<S>(call.sides[0], slot);
    const T* y = row_of<T>(call.sides[1], slot);
    if (x && y) {
      backward_pair<kSide, S, T, B>(call, x, y, slot, out);
    } else {
      std::fill_n(out, rows.vocab_size, Own{});
    }
  });
}

template <class S, class T, class B = Wider<S, T>>
void backward(const RowDivergenceBackward& call, const Parallel& parallel) {
  backward_side<0, S, T, B>(call, parallel);
  backward_side<1, S, T, B>(call, parallel);
}

}  // namespace

#define MLOT_BY_TEACHER(function, S) \
  {function<S, float>, function<S, bfloat16>, function<S, float16>, function<S, double>}
#define MLOT_BY_STUDENT(function)                                                                             \
  {MLOT_BY_TEACHER(function, float), MLOT_BY_TEACHER(function, bfloat16), MLOT_BY_TEACHER(function, float16), \
   MLOT_BY_TEACHER(function, double)}

extern const RowDivergence row_divergence = {MLOT_BY_STUDENT(forward), MLOT_BY_STUDENT(backward)};

}  // namespace mlot::MLOT_ISA
