// A pair of rows as row_divergence goes over it: chunks of the columns that meet, as log-probabilities.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "mlot/cpu/divergence_terms.h"
#include "mlot/cpu/logits.h"
#include "mlot/cpu/scalar.h"

namespace mlot::MLOT_ISA {

template <class S, class T>
using Wider = std::conditional_t<sizeof(S) == 8 || sizeof(T) == 8, double, float>;

// One side's row, and how its logits become logarithms of its softmax: (x - peak) inverse - log_total.
template <class T>
struct DivergenceRow {
  using A = Accumulator<T>;

  const T* x;
  const LogitsRows* rows;
  A peak = 0, inverse = 0, log_total = 0;
  double log_scale = 0;
};

// Which columns meet: those of pairs, or the same ones.
struct Columns {
  const DivergenceOptions& options;
  int64_t size;

  int64_t of(int side, int64_t i) const { return options.pairs ? options.pairs[2 * i + side] : i; }
};

// (x - peak) factor - offset at columns `first` to `first` + n of those that meet, NaN where there is no such column.
template <class B, class T, class A = Accumulator<T>>
static inline void read(const DivergenceRow<T>& row, const Columns& columns, int side, int64_t first, int64_t n,
                        A factor, A offset, B* out) {
  if (!columns.options.pairs) {
    const T* x = row.x + first;
    const A peak = row.peak;
    for (int64_t i = 0; i < n; ++i) out[i] = B((wide(x[i]) - peak) * factor - offset);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t column = columns.of(side, first + i);
    const bool exists = column >= 0 && column < row.rows->vocab_size;
    out[i] = exists ? B((wide(row.x[column]) - row.peak) * factor - offset) : B(NAN);
  }
}

// A pair of rows, student first, and how their terms are made.
template <class S, class T, class B = Wider<S, T>>
struct RowPair {
  DivergenceRow<S> student;
  DivergenceRow<T> teacher;
  const DivergenceOptions& options;
  Columns columns;
  bool every_meets;    // column of both sides
  bool whole;          // every one meets, and none counts as a floor
  B target_log_total;  // of the logits that the student is held against; used where interpolation < 1
  TermOptions<B> of_terms;
  double mass_difference;  // what the terms' balance leaves
  AddTerms<B> add;

  RowPair(const LogitsRows (&sides)[2], const DivergenceOptions& options_, const S* x, const T* y)
      : student{x, &sides[0]},
        teacher{y, &sides[1]},
        options(options_),
        columns{options_, options_.pairs ? options_.pair_count : sides[0].vocab_size},
        every_meets(!options_.pairs && !sides[0].column_mask && !sides[1].column_mask),
        whole(every_meets && options_.floor == 0),
        add(options_.floor > 0 ? terms_of<B, true>(options_.kind) : terms_of<B, false>(options_.kind)) {}

  // With all scalars of the rows in place.
  void set_options(double share) {
    const TermConstants constants = constants_of(options, share);
    of_terms = {.scale = {B(std::exp(student.log_scale)), B(std::exp(teacher.log_scale))},
                .more = B(teacher.log_scale - student.log_scale),
                .weight = B(constants.weight),
                .share = B(share),
                .skew = B(options.skew),
                .kappa = whole ? B(0) : B(constants.kappa),
                .balance = whole ? B(constants.kappa) : B(0),
                .floor = B(options.floor),
                .log_floor = B(std::log(options.floor)),
                .log_scale = {B(student.log_scale), B(teacher.log_scale)}};
    mass_difference = whole ? constants.kappa * (std::exp(teacher.log_scale) - std::exp(student.log_scale)) : 0;
  }

  // The logits that TAID mixes, each relative to its row's peak, in the second side's place. Equal ones stay the same.
  void mix(TermChunk<B>& chunk, int64_t first, int64_t n) const {
    read(student, columns, 0, first, n, student.inverse, Accumulator<S>(0), chunk.log_softmax[0]);
    read(teacher, columns, 1, first, n, teacher.inverse, Accumulator<T>(0), chunk.log_softmax[1]);
    const B t = B(options.interpolation);
    for (int64_t i = 0; i < n; ++i) {
      const B own = chunk.log_softmax[0][i], other = chunk.log_softmax[1][i];
      const bool absent = own == B(-INFINITY) || other == B(-INFINITY);
      chunk.log_softmax[1][i] = absent ? B(-INFINITY) : own + t * (other - own);
    }
  }

  // Fills log_softmax of both sides with columns `first` to `first` + n.
  void load(TermChunk<B>& chunk, int64_t first, int64_t n) const {
    if (options.interpolation < 1) {
      mix(chunk, first, n);
      for (int64_t i = 0; i < n; ++i) chunk.log_softmax[1][i] -= target_log_total;
    } else {
      read(teacher, columns, 1, first, n, teacher.inverse, teacher.log_total, chunk.log_softmax[1]);
    }
    read(student, columns, 0, first, n, student.inverse, student.log_total, chunk.log_softmax[0]);
    for (int64_t i = n; i % kWidth<B> != 0; ++i) chunk.log_softmax[0][i] = chunk.log_softmax[1][i] = B(-INFINITY);
    if (every_meets) return;
    const int64_t ends[2] = {student.rows->vocab_size, teacher.rows->vocab_size};
    const bool* masks[2] = {student.rows->column_mask, teacher.rows->column_mask};
    for (int side = 0; side < 2; ++side) {
      for (int64_t i = 0; masks[side] && i < n; ++i) {
        const int64_t column = columns.of(side, first + i);
        const bool left_out = column >= 0 && column < ends[side] && !masks[side][column];
        if (left_out && options.pairs) {  // a pair without a column stays NaN
          for (auto& log_softmax : chunk.log_softmax) {
            if (log_softmax[i] == log_softmax[i]) log_softmax[i] = B(-INFINITY);
          }
        } else if (left_out) {
          chunk.log_softmax[0][i] = chunk.log_softmax[1][i] = B(-INFINITY);
        }
      }
    }
  }

  template <class Use>
  void for_chunks(TermChunk<B>& chunk, Use use) const {
    for (int64_t first = 0; first < columns.size; first += kTermColumns) {
      const int64_t n = std::min(kTermColumns, columns.size - first);
      load(chunk, first, n);
      use(first, n);
    }
  }
};

// The log of the sum of exp over the columns that `fill(first, n)` leaves in a chunk of one side.
template <class B, class Fill>
static inline B log_total_of(int64_t columns, const B* chunk, Fill fill) {
  B peak = -INFINITY;
  double total = 0;
  for (int64_t first = 0; first < columns; first += kTermColumns) {
    const int64_t n = std::min(kTermColumns, columns - first);
    fill(first, n);
    const B highest = std::max(peak, *std::max_element(chunk, chunk + n));
    if (highest > peak) total *= std::exp(double(peak) - double(highest)), peak = highest;
    const B below = peak == B(-INFINITY) ? B(0) : peak;  // -inf so far; or NaN, which shows
    double of_chunk = 0;
    for (int64_t i = 0; i < n; ++i) of_chunk += exp_negative(chunk[i] - below);
    total += of_chunk;
  }
  return B(double(peak) + std::log(peak == B(-INFINITY) ? NAN : total));
}

// The part of |p - q| that lies in the head: the fewest of the largest p whose sum is above `head` of all, equal ones
// together. 1/2 where p = q throughout.
template <class S, class T, class B>
static inline double share_of_forward(const RowPair<S, T, B>& pair, TermChunk<B>& chunk) {
  const size_t size = size_t(pair.columns.size);
  std::vector<std::pair<B, B>> of_columns(size);  // p, |p - q|
  double mass = 0, whole = 0;
  pair.for_chunks(chunk, [&](int64_t first, int64_t n) {
    pair.add(chunk, n, pair.of_terms);
    for (int64_t i = 0; i < n; ++i) {
      const B p = chunk.softmax[1][i] * pair.of_terms.scale[1], difference = chunk.difference[i];
      of_columns[size_t(first + i)] = {p, difference};
      mass += double(p), whole += double(difference);
    }
  });
  if (!(whole > 0) || !(mass >= 0)) return whole == 0 ? 0.5 : NAN;
  // Halves what may hold the boundary until it is one value: partitions about a pivot, of which one part goes on.
  double above = 0, of_head = 0;
  auto begin = of_columns.begin(), end = of_columns.end();
  while (begin != end) {
    const B pivot = begin[(end - begin) / 2].first;
    const auto higher = std::partition(begin, end, [pivot](const auto& c) { return c.first > pivot; });
    const auto equal = std::partition(higher, end, [pivot](const auto& c) { return c.first == pivot; });
    const auto add = [](auto from, auto to, double& sum, double& difference) {
      for (; from != to; ++from) sum += from->first, difference += from->second;
    };
    double of_higher = 0, difference_of_higher = 0, of_equal = 0, difference_of_equal = 0;
    add(begin, higher, of_higher, difference_of_higher), add(higher, equal, of_equal, difference_of_equal);
    if (above + of_higher > pair.options.head * mass) {
      end = higher;
      continue;
    }
    above += of_higher + of_equal, of_head += difference_of_higher + difference_of_equal;
    if (above > pair.options.head * mass) break;
    begin = equal;
  }
  return of_head / whole;
}

}  // namespace mlot::MLOT_ISA
