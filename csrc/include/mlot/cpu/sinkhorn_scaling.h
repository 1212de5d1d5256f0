// Sinkhorn's steps on scalings u and v: one exp per element, then two products with the kernel per step.
//
// A segment is a run of steps with one kernel K = 2^(F + X + G): F and G are the log-scalings when it was made, and u
// and v of its steps are relative to them. Step 1 makes the first kernel, so that its own u and v are 1; from then on a
// step moves a log-scaling by at most log(1 / smallest marginal), and where one is beyond kAbsorbBeyond after a step,
// the next step opens a new segment.
#pragma once

#include "mlot/cpu/sinkhorn_log.h"
#include "mlot/cpu/sinkhorn_sweep.h"

namespace mlot::MLOT_ISA {

constexpr double kWidestScaling = 80;  // range(C) / epsilon up to which "auto" scales: exp(-80) is a normal float

template <class A>
constexpr double kAbsorbBeyond = std::is_same_v<A, double> ? 300 : 30;

// The lowest cost of each row and the range of all, over costs that are not +inf. NaN is passed over.
template <class A>
struct Extent {
  Buffer<A> lowest;  // [m]
  A range = 0;
};

template <class A>
static inline void find_extent(const Problem<A>& p, const Slabs<A>& slabs, Extent<A>& extent) {
  A* lowest = extent.lowest.resize(p.m);
  std::vector<A> highest(size_t(slabs.count()), A(-INFINITY));
  slabs.run([&](int64_t slab, int64_t first, int64_t last) {
    Vector<A> above = all(A(-INFINITY));
    for (int64_t i = first; i < last; ++i) {
      Vector<A> below = all(A(-INFINITY));
      for (int64_t j = 0; j < p.width; j += kWidth<A>) {
        const Vector<A> c = load(p.row(i) + j);
        below = larger(-c, below);
        above = larger(c == A(INFINITY) ? all(A(-INFINITY)) : c, above);
      }
      lowest[i] = -largest<A>(below);
    }
    highest[slab] = largest<A>(above);
  });
  extent.range = *std::max_element(highest.begin(), highest.end()) - *std::min_element(lowest, lowest + p.m);
}

static inline bool prefers_scaling(Domain domain, double range, double epsilon) {
  return domain == Domain::scaling || (domain == Domain::automatic && range <= kWidestScaling * epsilon);
}

// The kernel of one segment, and what it was made with.
template <class A>
class Segment {
 public:
  Buffer<A> kernel;                           // [m, width]
  std::vector<double> row_base, column_base;  // [m], [n]: F and G less the logarithms of the factors
  Buffer<A> row_factor, column_factor;        // [m], [width]

  // The first one, by step 1.
  void start(const Problem<A>& p, const Slabs<A>& slabs, const Extent<A>& extent) {
    kernel.resize(p.m * p.width);
    row_base.resize(p.m), column_base.resize(p.n);
    row_factor.resize(p.m), column_factor.resize(p.width);
    from_rows_ = start_from_rows(p, slabs, extent);
    if (!from_rows_) start_in_logarithms(p, slabs);
  }

  // Multiplies the rows from i on by the factors, where that is still to be done.
  template <int R>
  void complete_rows(int64_t i, int64_t width) {
    if (complete_) return;
    const A* column = column_factor.get();
    for (int r = 0; r < R; ++r) {
      A* row = kernel.get() + (i + r) * width;
      const A factor = row_factor[i + r];
      for (int64_t j = 0; j < width; j += kWidth<A>) store(load(row + j) * factor * load(column + j), row + j);
    }
  }

  void completed() { complete_ = true; }

  // Whether step 1 made the kernel from 2^X; then v_0 is 1 / column_factor in its coordinates.
  bool from_rows() const { return from_rows_; }

  void complete(const Problem<A>& p, const Slabs<A>& slabs) {
    if (complete_) return;
    slabs.run([&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) complete_rows<1>(i, p.width);
    });
    complete_ = true;
  }

  double F(int64_t i, A u) const { return row_base[i] + std::log2(double(row_factor[i]) * double(u)); }
  double G(int64_t j, A v) const { return column_base[j] + std::log2(double(column_factor[j]) * double(v)); }

  // Moves to the segment that begins at u and v of this one; `rebuild` makes its kernel.
  void absorb(const Problem<A>& p, const A* u, const A* v) {
    for (int64_t i = 0; i < p.m; ++i) row_base[i] = A(F(i, u[i])), row_factor[i] = 1;
    for (int64_t j = 0; j < p.n; ++j) column_base[j] = A(G(j, v[j])), column_factor[j] = 1;
  }

  void rebuild(const Problem<A>& p, const Slabs<A>& slabs) {
    A *F = rows_.resize(p.m), *G = columns_.resize(p.width);
    std::copy_n(row_base.data(), p.m, F), std::copy_n(column_base.data(), p.n, G);
    std::fill(G + p.n, G + p.width, A(0));
    slabs.run([&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        for (int64_t j = 0; j < p.width; j += kWidth<A>) {
          const Vector<A> t = F[i] - load(p.row(i) + j) * p.scale + load(G + j);
          store(exp2_negative<A>(at_least_smallest<A>(t)), kernel.get() + i * p.width + j);
        }
      }
    });
    complete_ = true;
  }

 private:
  // From 2^X with the largest of each row 1: no exp more. Impossible where a product of it with the factors, or with
  // scalings within kAbsorbBeyond, could leave the normal numbers; returns whether it was possible.
  bool start_from_rows(const Problem<A>& p, const Slabs<A>& slabs, const Extent<A>& extent) {
    if (!(extent.range <= kWidestScaling * p.epsilon)) return false;
    A* totals = column_factor.get();
    slabs.sum(totals, p.width, scratch_, [&](int64_t first, int64_t last, A* partial) {
      over_blocks<A>(first, last, p.width, [&]<int R>(int64_t i) {
        for (int r = 0; r < R; ++r) {
          row_factor[i + r] =
              p.a[i + r] / exp_row(p.row(i + r), extent.lowest[i + r], p, kernel.get() + (i + r) * p.width);
        }
        add_rows<R, A>(kernel.get() + i * p.width, p.width, row_factor.get() + i, partial);
      });
    });
    constexpr A kSmall = std::numeric_limits<A>::min() * A(1 << 14), kLarge = 1 / kSmall;
    const A smallest = std::exp2(-extent.range * p.scale);
    bool normal = true;
    for (int64_t i = 0; i < p.m; ++i) {
      normal = normal && row_factor[i] * smallest > kSmall && row_factor[i] < kLarge;
      row_base[i] = double(extent.lowest[i]) * double(p.scale);
    }
    for (int64_t j = 0; j < p.n; ++j) {
      const A v = p.b[j] / totals[j];
      normal = normal && v > kSmall && v < kLarge;
      totals[j] = v, column_base[j] = 0;
    }
    std::fill(totals + p.n, totals + p.width, A(0));
    complete_ = false;
    return normal;
  }

  static A exp_row(const A* cost, A lowest, const Problem<A>& p, A* out) {
    Vector<A> total[2] = {};
    for (int64_t j = 0; j < p.width; j += 2 * kWidth<A>) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const int64_t k = j + h * kWidth<A>;
        const Vector<A> e = exp2_negative<A>(at_least_smallest<A>((lowest - load(cost + k)) * p.scale));
        store(e, out + k);
        total[h] += e;
      }
    }
    return sum<A>(total[0] + total[1]);
  }

  void start_in_logarithms(const Problem<A>& p, const Slabs<A>& slabs) {
    A *F = rows_.resize(p.m), *G = columns_.resize(p.width);
    std::fill_n(G, p.width, A(0));
    log_step(p, slabs, G, F, totals_);
    for (int64_t i = 0; i < p.m; ++i) row_base[i] = F[i], row_factor[i] = 1;
    for (int64_t j = 0; j < p.n; ++j) column_base[j] = A(log_column(p, totals_, j)), column_factor[j] = 1;
    rebuild(p, slabs);
  }

  bool complete_ = true, from_rows_ = false;
  Buffer<A> rows_, columns_, scratch_;
  ColumnTotals<A> totals_;
};

// Whether the step after one that ended at u and v opens a new segment. NaN opens none.
template <class A>
static inline bool must_absorb(const A* u, int64_t m, const A* v, int64_t n) {
  const A above = A(std::exp(kAbsorbBeyond<A>)), below = A(std::exp(-kAbsorbBeyond<A>));
  int beyond = 0;  // a sum of bool would not be vectors
  for (int64_t i = 0; i < m; ++i) beyond |= (u[i] > above) | (u[i] < below);
  for (int64_t j = 0; j < n; ++j) beyond |= (v[j] > above) | (v[j] < below);
  return beyond != 0;
}

// Steps from 2 on, until `iterations` or until one has moved no log v by more than `tolerance`; returns how many were
// taken, step 1 included. u and v [width] become those of the last step, in `segment`'s coordinates; keep(step, u, v)
// is called after each.
template <class A, class Keep>
static inline int64_t scale_steps(const Problem<A>& p, const Slabs<A>& slabs, int64_t iterations, double tolerance,
                                  Segment<A>& segment, Buffer<A>& scratch, A* u, A* v, A* sums, const Keep& keep) {
  // A move within the last places of v is none. In double, where tolerances can be smaller than a float's last place.
  const double moved_above = std::exp(tolerance) * (1 + 4 * double(std::numeric_limits<A>::epsilon())),
               moved_below = 1 / moved_above;
  std::fill_n(u, p.m, A(1));
  std::fill_n(v, p.n, A(1)), std::fill(v + p.n, v + p.width, A(0));
  bool done = tolerance > 0;
  for (int64_t j = 0; done && j < p.n; ++j) done = std::abs(segment.G(j, 1)) <= std::log2(moved_above);
  keep(1, u, v);
  int64_t step = 1;
  const auto complete = [&]<int R>(int64_t i) { segment.template complete_rows<R>(i, p.width); };
  const auto row_step = [&]<int R>(int64_t i, const A* totals, A* scales) {
    Few<A, R> next(p.a.get() + i);
    next.values /= Few<A, R>(totals).values;
    next.store(u + i), next.store(scales);
  };
  while (!done && step < iterations) {
    ++step;
    sweep(segment.kernel.get(), p.width, v, slabs, scratch, sums, complete, row_step);
    segment.completed();
    const A* b = p.b.get();
    for (int64_t j = 0; j < p.n; ++j) sums[j] = b[j] / sums[j];
    done = tolerance > 0;
    for (int64_t j = 0; done && j < p.n; ++j) {
      const double ratio = double(sums[j]) / double(v[j]);
      done = ratio <= moved_above && ratio >= moved_below;
    }
    std::copy_n(sums, p.n, v);
    keep(step, u, v);
    if (!done && step < iterations && must_absorb(u, p.m, v, p.n)) {
      segment.absorb(p, u, v);
      segment.rebuild(p, slabs);
      std::fill_n(u, p.m, A(1)), std::fill_n(v, p.n, A(1));
    }
  }
  segment.complete(p, slabs);
  return step;
}

}  // namespace mlot::MLOT_ISA
