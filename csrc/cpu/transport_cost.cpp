// transport_cost on a CPU; compiled once per instruction set.
#include "mlot/cpu/transport_cost.h"

#include "mlot/cpu/pairwise.h"
#include "mlot/cpu/part_sums.h"
#include "mlot/cpu/sinkhorn_backward.h"

namespace mlot::MLOT_ISA {
namespace {

static_assert(kSlabRows % kTileRows == 0, "a slab's costs are whole tiles");

// The rows of problem b that count.
template <class A>
void read(const FeatureRows& side, int64_t width, int64_t b, const Counted& counted, Features<A>& features) {
  with_type(side.dtype, [&]<class T>(T*) {
    const T* from = static_cast<const T*>(side.values) + b * side.problem_stride;
    if (counted.leading) {
      features.read(from, counted.size(), width, side.row_stride, side.column_stride);
      return;
    }
    std::vector<T> rows(size_t(counted.size() * width));
    for (int64_t i = 0; i < counted.size(); ++i) {
      const T* row = from + counted.index[i] * side.row_stride;
      for (int64_t d = 0; d < width; ++d) rows[i * width + d] = row[d * side.column_stride];
    }
    features.read(rows.data(), counted.size(), width, width, 1);
  });
}

// The gradient of problem b's rows, zeros for those that do not count; nothing counts where `sums` is null.
template <class A>
void write_gradient(const FeatureRows& side, int64_t width, int64_t b, const Counted& counted,
                    const Features<A>& features, const A* sums, void* grad) {
  with_type(side.dtype, [&]<class T>(T*) {
    T* out = static_cast<T*>(grad) + b * side.rows * width;
    const int64_t written = sums ? counted.size() : 0;
    if (sums && counted.leading) features.write_gradient(sums, out);
    if (written == 0 || counted.leading) {
      std::fill(out + written * width, out + side.rows * width, T{});
      return;
    }
    std::vector<T> rows(size_t(written * width));
    features.write_gradient(sums, rows.data());
    std::fill_n(out, side.rows * width, T{});
    for (int64_t i = 0; i < written; ++i) std::copy_n(&rows[i * width], width, out + counted.index[i] * width);
  });
}

// What a thread works with: one problem's features and its cost at a time.
template <class A>
struct Scratch {
  Workspace<A> work;
  AdjointScratch<A> adjoint;
  Features<A> x{Metric::l1, Role::row}, y{Metric::l1, Role::column};
  Buffer<A> gradient;  // dl/dC [m, width]
  std::vector<A> x_sums;
  PartSums<A> y_sums;
};

// Makes problem b ready, its cost in scratch.
template <class A>
Slabs<A> read_problem(const FeaturePairs& pairs, const TransportOptions& options, int64_t b, const Parallel* threads,
                      Scratch<A>& s) {
  Problem<A>& p = s.work.problem;
  prepare(options, b, p);
  const Slabs<A> slabs(p.m, threads);
  if (p.m == 0) return slabs;
  if (s.x.metric() != pairs.metric) {
    s.x = Features<A>(pairs.metric, Role::row), s.y = Features<A>(pairs.metric, Role::column);
  }
  read(pairs.x, pairs.width, b, p.rows, s.x), read(pairs.y, pairs.width, b, p.columns, s.y);
  A* cost = p.own_cost.resize(p.m * p.width);
  p.cost = cost, p.cost_stride = p.width;
  slabs.run([&](int64_t, int64_t first, int64_t last) {
    cost_rows(s.x, first, last, s.y, cost + first * p.width, p.width);
    for (int64_t i = first; i < last; ++i) std::fill(cost + i * p.width + p.n, cost + (i + 1) * p.width, A(INFINITY));
  });
  return slabs;
}

template <class A>
void forward(const TransportCostForward& call, const Parallel& parallel) {
  over_problems<Scratch<A>>(call.options, parallel, [&](int64_t b, const Parallel* threads, Scratch<A>& s) {
    const Slabs<A> slabs = read_problem(call.pairs, call.options, b, threads, s);
    solve(call.options, call.outputs, b, slabs, s.work, static_cast<A*>(nullptr));
  });
}

// Rows of a problem whose sums for y are made by themselves, and then added in order: whole slabs, in at most 8 parts.
// Depends on the problem's size alone.
int64_t part_rows(int64_t rows) {
  constexpr int64_t kMostParts = 8;
  const int64_t slabs = (rows + kSlabRows - 1) / kSlabRows;
  return (slabs + kMostParts - 1) / kMostParts * kSlabRows;
}

// The sums for both sides of dl/dC in `s.gradient`. A thread owns rows of x.
template <class A>
void pass_on(const FeaturePairs& pairs, bool for_x, bool for_y, const Parallel* threads, Scratch<A>& s) {
  const Problem<A>& p = s.work.problem;
  const int64_t rows = part_rows(p.m), parts = (p.m + rows - 1) / rows;
  if (for_x) s.x_sums.assign(size_t(s.x.sums_size()), A(0));
  s.y_sums.start(parts, for_y ? s.y.sums_size() : 0, threads != nullptr);
  const auto make = [&](int64_t first_part, int64_t last_part) {
    for (int64_t part = first_part; part < last_part; ++part) {
      const int64_t first = part * rows, last = std::min(p.m, first + rows);
      A* weights = s.gradient.get() + first * p.width;
      if (pairs.metric == Metric::l2) l2_weights(weights, p.row(first), (last - first) * p.width, weights);
      cost_backward_rows(s.x, first, last, s.y, weights, p.width, for_x ? s.x_sums.data() : nullptr,
                         s.y_sums.begin(part));
      s.y_sums.end();
    }
  };
  if (threads) {
    (*threads)(parts, 1, make);
  } else {
    make(0, parts);
  }
}

template <class A>
void backward(const TransportCostBackward& call, const Parallel& parallel) {
  const FeaturePairs& pairs = call.pairs;
  over_problems<Scratch<A>>(call.options, parallel, [&](int64_t b, const Parallel* threads, Scratch<A>& s) {
    const Slabs<A> slabs = read_problem(pairs, call.options, b, threads, s);
    const Problem<A>& p = s.work.problem;
    A* gradient = s.gradient.resize(p.m * p.width);
    differentiate(call.options, call.upstream, call.saved, call.gradients, b, slabs, s.work, s.adjoint,
                  static_cast<const A*>(nullptr), [&](int64_t first, int64_t last, const A* rows) {
                    std::copy_n(rows, (last - first) * p.width, gradient + first * p.width);
                  });
    const bool any = p.m > 0 && pairs.width > 0;
    if (any) pass_on(pairs, call.grad_x != nullptr, call.grad_y != nullptr, threads, s);
    const A *x_sums = any ? s.x_sums.data() : nullptr, *y_sums = any ? s.y_sums.total() : nullptr;
    if (call.grad_x) write_gradient(pairs.x, pairs.width, b, p.rows, s.x, x_sums, call.grad_x);
    if (call.grad_y) write_gradient(pairs.y, pairs.width, b, p.columns, s.y, y_sums, call.grad_y);
  });
}

}  // namespace

extern const TransportCost transport_cost = {{forward<float>, forward<double>}, {backward<float>, backward<double>}};

}  // namespace mlot::MLOT_ISA
