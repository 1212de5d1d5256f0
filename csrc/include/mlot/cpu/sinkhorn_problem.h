// One transport problem as the solvers take it: what counts of it, dense, and how its rows are shared among threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "mlot/cpu/sinkhorn.h"
#include "mlot/cpu/vector.h"

namespace mlot::MLOT_ISA {

constexpr int64_t kSlabRows = 64;  // rows whose column sums are added by themselves, whoever adds them

// Scratch on a line's boundary that is not cleared, which for a matrix would cost as much as a sweep.
template <class A>
class Buffer {
 public:
  A* resize(int64_t elements) {
    if (elements > room_) {
      constexpr std::align_val_t kLine{64};
      values_.reset(static_cast<A*>(::operator new(size_t(elements) * sizeof(A), kLine)));
      room_ = elements;
    }
    return values_.get();
  }
  A* get() const { return values_.get(); }
  A& operator[](int64_t i) const { return values_.get()[i]; }

 private:
  struct Free {
    void operator()(A* values) const { ::operator delete(values, std::align_val_t{64}); }
  };
  std::unique_ptr<A, Free> values_;
  int64_t room_ = 0;
};

// `v`, and 0 where `factor` is 0: what is not carried counts nothing, were its cost infinite.
template <class A>
MLOT_INLINE Vector<A> where_carried(Vector<A> factor, Vector<A> v) {
  return std::bit_cast<Vector<A>>(std::bit_cast<VectorBits<A>>(v) & VectorBits<A>(factor != A(0)));
}

// Shares the rows of one problem in slabs, whose column sums are added in the order of the slabs: the bits depend on
// the number of rows alone.
template <class A>
class Slabs {
 public:
  // `parallel` is null where one thread takes them all.
  Slabs(int64_t rows, const Parallel* parallel) : rows_(rows), parallel_(parallel) {}

  int64_t count() const { return (rows_ + kSlabRows - 1) / kSlabRows; }

  // body(slab, first row, last row) for each.
  template <class Body>
  void run(const Body& body) const {
    const auto range = [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) body(s, s * kSlabRows, std::min(rows_, (s + 1) * kSlabRows));
    };
    if (parallel_ && count() > 1) {
      (*parallel_)(count(), 1, range);
    } else {
      range(0, count());
    }
  }

  // The same with body(first row, last row, sums), which adds to `sums` [columns]; their total goes to `total`.
  // `columns` is a multiple of kWidth<A>.
  template <class Body>
  void sum(A* total, int64_t columns, Buffer<A>& scratch, const Body& body) const {
    A* partial = count() > 1 ? scratch.resize(count() * columns) : total;
    run([&](int64_t slab, int64_t first, int64_t last) {
      std::fill_n(partial + slab * columns, columns, A(0));
      body(first, last, partial + slab * columns);
    });
    if (count() <= 1) return;
    for (int64_t j = 0; j < columns; j += kWidth<A>) {
      Vector<A> sum = load(partial + j);
      for (int64_t s = 1; s < count(); ++s) sum += load(partial + s * columns + j);
      store(sum, total + j);
    }
  }

 private:
  int64_t rows_;
  const Parallel* parallel_;
};

// The rows or columns of a problem that count.
struct Counted {
  std::vector<int64_t> index;
  bool leading;  // they are the first ones

  int64_t size() const { return int64_t(index.size()); }

  // values [size] to where they belong in out [all], 0 elsewhere.
  template <class A, class B>
  void scatter(const A* values, B* out, int64_t all_of_them) const {
    if (leading) {
      std::copy_n(values, size(), out);
      std::fill(out + size(), out + all_of_them, B(0));
      return;
    }
    std::fill_n(out, all_of_them, B(0));
    for (int64_t i = 0; i < size(); ++i) out[index[i]] = values[i];
  }

  template <class A>
  void gather(const A* values, A* out) const {
    for (int64_t i = 0; i < size(); ++i) out[i] = values[index[i]];
  }
};

// Matrices of a problem are [m, width]; what lies between n and width costs +inf. Vectors over columns are [width] and
// 0 there.
template <class A>
struct Problem {
  Counted rows, columns;
  int64_t m, n, width;
  const A* cost;                     // [m, cost_stride]
  int64_t cost_stride;               // at least `width`
  Buffer<A> a, b, weight;            // [m], [width], [width] or empty
  Buffer<A> inverse_a, inverse_b;    // 1 / a, 1 / b
  std::vector<double> log_a, log_b;  // of base 2
  double epsilon;
  A scale;  // log2(e) / epsilon
  Buffer<A> own_cost;

  const A* row(int64_t i) const { return cost + i * cost_stride; }
  const A* weights() const { return weight.get(); }
};

// Rows and columns below the problem's lengths whose marginal is not 0; none at all where either side has none.
template <class A>
static inline void count(const TransportOptions& options, int64_t b, Problem<A>& problem) {
  const auto side = [&](const int64_t* lengths, const void* marginal, int64_t n, Counted& counted) {
    const int64_t length = lengths ? std::clamp(lengths[b], int64_t(0), n) : n;
    const A* weights = marginal ? static_cast<const A*>(marginal) + b * n : nullptr;
    counted.index.clear();
    for (int64_t i = 0; i < length; ++i) {
      if (!weights || weights[i] != 0) counted.index.push_back(i);
    }
    counted.leading = counted.index.empty() || counted.index.back() == counted.size() - 1;
  };
  side(options.row_lengths, options.row_marginal, options.rows, problem.rows);
  side(options.column_lengths, options.column_marginal, options.columns, problem.columns);
  if (problem.rows.index.empty() || problem.columns.index.empty()) {
    problem.rows = problem.columns = {{}, true};
  }
  problem.m = problem.rows.size(), problem.n = problem.columns.size();
  constexpr int64_t kStep = 2 * kWidth<A>;
  problem.width = (problem.n + kStep - 1) / kStep * kStep;
}

template <class A>
static inline void fill_marginals(const TransportOptions& options, int64_t b, Problem<A>& p) {
  const int64_t m = p.m, n = p.n;
  A *row = p.a.resize(m), *column = p.b.resize(p.width);
  p.log_a.resize(m), p.log_b.resize(n);
  if (options.marginals == Marginals::given) {
    p.rows.gather(static_cast<const A*>(options.row_marginal) + b * options.rows, row);
    p.columns.gather(static_cast<const A*>(options.column_marginal) + b * options.columns, column);
    for (int64_t i = 0; i < m; ++i) p.log_a[i] = std::log2(double(row[i]));
    for (int64_t j = 0; j < n; ++j) p.log_b[j] = std::log2(double(column[j]));
  } else {  // "unit": a = n / m keeps the scalings from drifting by (m / n)^l; the last step gives the same plan
    const bool unit = options.marginals == Marginals::unit;
    const double each_row = (unit ? double(n) : 1.0) / double(m), each_column = unit ? 1.0 : 1.0 / double(n);
    std::fill_n(row, m, A(each_row)), std::fill_n(column, n, A(each_column));
    std::fill(p.log_a.begin(), p.log_a.end(), std::log2(each_row));
    std::fill(p.log_b.begin(), p.log_b.end(), std::log2(each_column));
  }
  std::fill(column + n, column + p.width, A(0));
  A *inverse_row = p.inverse_a.resize(m), *inverse_column = p.inverse_b.resize(p.width);
  for (int64_t i = 0; i < m; ++i) inverse_row[i] = 1 / row[i];
  for (int64_t j = 0; j < n; ++j) inverse_column[j] = 1 / column[j];
  std::fill(inverse_column + n, inverse_column + p.width, A(0));
}

// All of problem b but its cost.
template <class A>
static inline void prepare(const TransportOptions& options, int64_t b, Problem<A>& problem) {
  count(options, b, problem);
  problem.epsilon = options.epsilon;
  problem.scale = A(kLog2E / options.epsilon);
  if (problem.m == 0) return;
  fill_marginals(options, b, problem);
  A* weight = problem.weight.resize(problem.width);
  std::fill_n(weight, problem.width, A(0));
  if (options.column_weight) {
    problem.columns.gather(static_cast<const A*>(options.column_weight) + b * options.columns, weight);
  } else {
    std::fill_n(weight, problem.n, A(1));
  }
}

// The cost of problem b: in its place where the solvers can read it there, else a dense copy of what counts.
template <class T, class A = Accumulator<T>>
static inline void read_cost(const CostMatrices& costs, int64_t b, const Slabs<A>& slabs, Problem<A>& problem) {
  const T* matrix = static_cast<const T*>(costs.values) + b * costs.batch_stride;
  const Counted &rows = problem.rows, &columns = problem.columns;
  if constexpr (std::is_same_v<T, A>) {
    if (rows.leading && columns.leading && costs.column_stride == 1 && problem.n == problem.width &&
        costs.row_stride >= problem.width) {
      problem.cost = matrix, problem.cost_stride = costs.row_stride;
      return;
    }
  }
  const int64_t n = problem.n, width = problem.width;
  A* own = problem.own_cost.resize(problem.m * width);
  slabs.run([&](int64_t, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T* from = matrix + rows.index[i] * costs.row_stride;
      A* to = own + i * width;
      if (columns.leading && costs.column_stride == 1) {
        for (int64_t j = 0; j < n; ++j) to[j] = wide(from[j]);
      } else {
        for (int64_t j = 0; j < n; ++j) to[j] = wide(from[columns.index[j] * costs.column_stride]);
      }
      std::fill(to + n, to + width, A(INFINITY));
    }
  });
  problem.cost = own, problem.cost_stride = width;
}

// Each problem by itself: many problems are shared among the threads, few large ones row by row within each.
//
// body(problem, its slabs' threads or null, scratch), with one Scratch a thread.
template <class Scratch, class Body>
static inline void over_problems(const TransportOptions& options, const Parallel& parallel, const Body& body) {
  constexpr int64_t kWorthSharing = 512 * 512, kElements = 4096;
  const int64_t elements = options.rows * options.columns;
  if (options.threads > 1 && options.problems < options.threads && elements >= kWorthSharing) {
    Scratch scratch;
    for (int64_t b = 0; b < options.problems; ++b) body(b, &parallel, scratch);
    return;
  }
  const int64_t grain = kElements / (elements + 1) + 1;
  parallel(options.problems, grain, [&](int64_t first, int64_t last) {
    Scratch scratch;
    for (int64_t b = first; b < last; ++b) body(b, nullptr, scratch);
  });
}

}  // namespace mlot::MLOT_ISA
