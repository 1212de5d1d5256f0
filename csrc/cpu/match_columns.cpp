// match_columns on a CPU; compiled once per instruction set.
#include "mlot/cpu/match_columns.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "mlot/cpu/pairwise.h"
#include "mlot/cpu/row_statistics.h"

namespace mlot::MLOT_ISA {
namespace {

constexpr int64_t kRowsAhead = 4;
constexpr int64_t kBlock = 256;  // student columns whose costs with all of the teacher's are made in the cache

// A counted row's probabilities are 2^((x - peak) factor) weight.
template <class T>
struct Row {
  const T* x;  // null: the row does not count
  Accumulator<T> peak, factor, weight;
};

template <class T>
Row<T> row_at(const LogitsRows& rows, int64_t slot) {
  using A = Accumulator<T>;
  const T* x = row_of<T>(rows, slot);
  if (!x) return {};
  ExponentialSums sums;
  const TemperaturePair alone{0, -1, 1};
  A log_total, expected;
  const auto row = row_statistics<T, A>(x, rows.vocab_size, rows.standardize, rows.temperatures, 1, &alone, 1, &sums,
                                        &log_total, &expected, 1, nullptr);
  const A log_scale = rows.log_scale ? static_cast<const A*>(rows.log_scale)[slot] : A(0);
  return {x, row.peak, A(kLog2E / (rows.temperatures[0] * double(row.scale))), std::exp(log_scale - log_total)};
}

// One sequence: its counted rows and the teacher's probabilities there, in panels [ceil(k / P)][rows][P] of P = kPanel
// columns, as pairwise.h has those of features. What pairwise.h calls a feature is a row here.
template <class T, class A>
struct Sequence {
  std::vector<Row<T>> rows;
  std::vector<A> teacher;
  bool finite = true;  // all probabilities of both sides are

  Sequence(const MatchColumns& call, const Row<T>* all_rows, int64_t b) {
    constexpr int64_t P = kPanel<A>;
    const int64_t slots = call.rows.slots, k = call.k;
    std::vector<const A*> log_t;
    for (int64_t slot = b * slots; slot < (b + 1) * slots; ++slot) {
      if (!all_rows[slot].x) continue;
      rows.push_back(all_rows[slot]);
      log_t.push_back(static_cast<const A*>(call.teacher) + slot * k);
      finite &= std::isfinite(rows.back().weight);
    }
    const int64_t n = int64_t(rows.size());
    teacher.resize((k + P - 1) / P * P * n);
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t a = 0; a < n; ++a) {
        const A probability = std::exp(log_t[a][i]);
        teacher[i / P * P * n + a * P + i % P] = probability;
        finite &= std::isfinite(probability);
      }
    }
  }

  // Where teacher column i is from row a on, from kPanel to kPanel elements.
  const A* teacher_column(int64_t i, int64_t a) const {
    constexpr int64_t P = kPanel<A>;
    return teacher.data() + i / P * P * int64_t(rows.size()) + a * P + i % P;
  }
};

// The probabilities of kPanel columns of a row, n of which exist, from x on.
template <class T, class A>
MLOT_INLINE void probabilities(const Row<T>& row, const T* x, int64_t n, A* out) {
  using S = Accumulator<T>;
  S values[kPanel<A>];
  if (n >= kPanel<A>) {
    for (int64_t l = 0; l < kPanel<A>; ++l) values[l] = wide(x[l]);
  } else {
    for (int64_t l = 0; l < kPanel<A>; ++l) values[l] = l < n ? S(wide(x[l])) : S(-INFINITY);
  }
  for (int64_t l = 0; l < kPanel<A>; l += kWidth<S>) {
    const Vector<S> t = at_least_smallest<S>((load(values + l) - row.peak) * row.factor);
    store<S>(exp2_negative<S>(t) * row.weight, values + l);
  }
  for (int64_t l = 0; l < kPanel<A>; ++l) out[l] = values[l];
}

// What a thread works with.
template <class A>
struct Scratch {
  std::vector<A> student;  // probabilities [kBlock / kPanel][kSumTerms rows][kPanel]
  std::vector<A> costs;    // [k, to whole tiles][kBlock]

  explicit Scratch(int64_t k) : student(kBlock * kSumTerms), costs((k + kTileRows) * kBlock) {}
};

// Makes the costs of the columns [start, start + kBlock) with all teacher columns, which the scratch then holds. Reads
// these columns of all rows once, and adds their terms in an order that depends on the number of rows alone.
template <class T, class A>
void block_costs(const Sequence<T, A>& sequence, int64_t k, int64_t start, int64_t columns, Scratch<A>& scratch) {
  constexpr int64_t P = kPanel<A>;
  const int64_t n = int64_t(sequence.rows.size());
  std::fill(scratch.costs.begin(), scratch.costs.end(), A(0));
  for (int64_t first = 0; first < n; first += kSumTerms) {
    const int64_t some = std::min(kSumTerms, n - first);
    for (int64_t a = 0; a < some; ++a) {
      const Row<T>& row = sequence.rows[first + a];
      // So few columns of each row are too few for the processor to see where the next ones will be.
      const T* ahead = sequence.rows[std::min(first + a + kRowsAhead, n - 1)].x + start;
      for (int64_t j = 0; j < columns; j += P) {
        __builtin_prefetch(ahead + j);
        probabilities(row, row.x + start + j, columns - j, scratch.student.data() + j * kSumTerms + a * P);
      }
    }
    for (int64_t j = 0; j < columns; j += P) {
      for (int64_t i = 0; i < k; i += kTileRows) {
        Vector<A> sums[kTileRows][2] = {};
        add_terms<Metric::l1, A>(sequence.teacher_column(i, first), scratch.student.data() + j * kSumTerms, some, sums);
        for (int r = 0; r < kTileRows; ++r) {
          A* to = scratch.costs.data() + (i + r) * kBlock + j;
          for (int h = 0; h < 2; ++h) store<A>(load(to + h * kWidth<A>) + sums[r][h], to + h * kWidth<A>);
        }
      }
    }
  }
}

template <class A>
A smallest(const A* costs, int64_t n) {
  A least = INFINITY;
#pragma omp simd reduction(min : least)
  for (int64_t j = 0; j < n; ++j) least = costs[j] < least ? costs[j] : least;
  return least;
}

// How many blocks are worth a thread's start.
int64_t blocks_worth_a_thread(int64_t rows, int64_t k) {
  constexpr int64_t kTerms = 1 << 18;
  return kTerms / (kBlock * (rows + 1) * (k + 1)) + 1;
}

// Writes the costs [k, vocab_size] of a sequence, inf where a column is not looked at, and the smallest of each block,
// [k, blocks]. A thread owns blocks of columns.
template <class T, class A>
void write_costs(const MatchColumns& call, const Sequence<T, A>& sequence, A* costs, A* minima,
                 const Parallel& parallel) {
  const int64_t V = call.rows.vocab_size, k = call.k, blocks = (V + kBlock - 1) / kBlock;
  const bool* mask = call.rows.column_mask;
  parallel(blocks, blocks_worth_a_thread(int64_t(sequence.rows.size()), k), [&](int64_t first, int64_t last) {
    Scratch<A> scratch(k);
    for (int64_t block = first; block < last; ++block) {
      const int64_t start = block * kBlock, columns = std::min(kBlock, V - start);
      block_costs(sequence, k, start, columns, scratch);
      for (int64_t i = 0; i < k; ++i) {
        A* made = scratch.costs.data() + i * kBlock;
        for (int64_t j = 0; mask && j < columns; ++j) {
          if (!mask[start + j]) made[j] = INFINITY;
        }
        minima[i * blocks + block] = smallest(made, columns);
        std::copy(made, made + columns, costs + i * V + start);
      }
    }
  });
}

// The greedy choice. Overwrites costs and minima, both as write_costs made them: a column that is taken costs inf for
// the teacher columns behind. Only the blocks that have lost a column are looked through again.
template <class A>
void choose(int64_t k, int64_t V, A* costs, A* minima, int64_t* columns) {
  const int64_t blocks = (V + kBlock - 1) / kBlock;
  std::vector<int64_t> changed;
  for (int64_t i = 0; i < k; ++i) {
    A *row = costs + i * V, *least = minima + i * blocks;
    for (const int64_t block : changed) {
      least[block] = smallest(row + block * kBlock, std::min(kBlock, V - block * kBlock));
    }
    const int64_t block = std::min_element(least, least + blocks) - least;  // the first of equals
    columns[i] = -1;
    if (least[block] == A(INFINITY)) continue;
    columns[i] = std::find(row + block * kBlock, row + V, least[block]) - row;
    for (int64_t behind = i + 1; behind < k; ++behind) costs[behind * V + columns[i]] = INFINITY;
    changed.push_back(block);
  }
}

// One sequence at a time, so that no more than its costs are kept.
template <class T, class A>
void run(const MatchColumns& call, const Parallel& parallel) {
  const LogitsRows& rows = call.rows;
  const int64_t V = rows.vocab_size, k = call.k;
  std::vector<Row<T>> all_rows(rows.all_slots());
  parallel(rows.all_slots(), worth_a_thread(V), [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) all_rows[slot] = row_at<T>(rows, slot);
  });
  const auto kept = std::make_unique_for_overwrite<A[]>(call.costs ? 0 : k * V);
  std::vector<A> minima(k * ((V + kBlock - 1) / kBlock));
  for (int64_t b = 0; b < rows.sequences; ++b) {
    const Sequence<T, A> sequence(call, all_rows.data(), b);
    A* costs = call.costs ? static_cast<A*>(call.costs) + b * k * V : kept.get();
    if (!sequence.finite) {
      if (call.costs) std::fill_n(costs, k * V, A(NAN));
      if (call.columns) std::fill_n(call.columns + b * k, k, int64_t(-1));
      continue;
    }
    write_costs(call, sequence, costs, minima.data(), parallel);
    if (call.columns) choose(k, V, costs, minima.data(), call.columns + b * k);
  }
}

}  // namespace

extern const ColumnMatching match_columns = {
    {{run<float, float>, run<bfloat16, float>, run<float16, float>, nullptr},
     {run<float, double>, run<bfloat16, double>, run<float16, double>, run<double, double>}}};

}  // namespace mlot::MLOT_ISA
