// pairwise_cost on a CPU; compiled once per instruction set.
#include "mlot/cpu/pairwise_cost.h"

#include <algorithm>
#include <vector>

#include "mlot/cpu/pairwise.h"
#include "mlot/cpu/part_sums.h"

namespace mlot::MLOT_ISA {
namespace {

// Rows [first, last) of problem b.
template <class A>
void read(const FeatureRows& side, int64_t width, int64_t b, int64_t first, int64_t last, Features<A>& features) {
  with_type(side.dtype, [&]<class T>(T*) {
    const T* from = static_cast<const T*>(side.values) + b * side.problem_stride + first * side.row_stride;
    features.read(from, last - first, width, side.row_stride, side.column_stride);
  });
}

template <class A>
void write_gradient(const FeatureRows& side, int64_t b, int64_t first, const Features<A>& features, const A* sums,
                    void* grad) {
  with_type(side.dtype, [&]<class T>(T*) {
    features.write_gradient(sums, static_cast<T*>(grad) + (b * side.rows + first) * features.width());
  });
}

void write_zeros(const FeaturePairs& pairs, const FeatureRows& side, void* grad) {
  with_type(side.dtype,
            [&]<class T>(T*) { std::fill_n(static_cast<T*>(grad), pairs.problems * side.rows * pairs.width, T{}); });
}

// Rows of x that are one piece of work. Depends on the problem's size alone, as backward adds up the gradient of y slab
// by slab: at least 32, so that adding is little beside making, and at most 16 slabs, whose sums are kept.
int64_t slab_rows(int64_t rows) {
  constexpr int64_t kFewest = 32, kMostSlabs = 16;
  const int64_t share = (rows + kMostSlabs - 1) / kMostSlabs;
  return std::max(kFewest, (share + kTileRows - 1) / kTileRows * kTileRows);
}

int64_t slabs_of(int64_t rows) { return (rows + slab_rows(rows) - 1) / slab_rows(rows); }

// How many slabs are worth a thread's start.
int64_t slabs_worth_a_thread(const FeaturePairs& pairs) {
  constexpr int64_t kTerms = 1 << 18;
  return kTerms / (slab_rows(pairs.x.rows) * (pairs.y.rows + 1) * (pairs.width + 1)) + 1;
}

// A thread owns slabs of rows of the cost. It makes the features of y ready once for each problem that it meets.
template <class A>
void forward(const PairwiseCostForward& call, const Parallel& parallel) {
  const FeaturePairs& pairs = call.pairs;
  const int64_t M = pairs.x.rows, N = pairs.y.rows, slab = slab_rows(M), slabs = slabs_of(M);
  parallel(pairs.problems * slabs, slabs_worth_a_thread(pairs), [&](int64_t first, int64_t last) {
    Features<A> x(pairs.metric, Role::row), y(pairs.metric, Role::column);
    for (int64_t task = first, ready = -1; task < last; ++task) {
      const int64_t b = task / slabs, start = task % slabs * slab, end = std::min(start + slab, M);
      if (b != ready) read(pairs.y, pairs.width, b, 0, N, y);
      ready = b;
      read(pairs.x, pairs.width, b, start, end, x);
      cost_rows(x, 0, end - start, y, static_cast<A*>(call.cost) + (b * M + start) * N, N);
    }
  });
}

// What a thread works with in backward. Its x is one slab.
template <class A>
struct BackwardScratch {
  Features<A> x;
  std::vector<A> x_sums, weights;

  explicit BackwardScratch(Metric metric) : x(metric, Role::row) {}
};

// Writes the slab's rows of grad_x, and adds to y_sums, where that is not null, what they pass on to y.
template <class A>
void backward_slab(const PairwiseCostBackward& call, int64_t b, int64_t slab, const Features<A>& y,
                   BackwardScratch<A>& scratch, A* y_sums) {
  const FeaturePairs& pairs = call.pairs;
  const int64_t M = pairs.x.rows, N = pairs.y.rows, first = slab * slab_rows(M),
                last = std::min(first + slab_rows(M), M);
  auto& [x, x_sums, weights] = scratch;
  read(pairs.x, pairs.width, b, first, last, x);
  const A* weight = static_cast<const A*>(call.grad) + (b * M + first) * N;
  if (pairs.metric == Metric::l2) {
    weights.resize((last - first) * N);
    cost_rows(x, 0, last - first, y, weights.data(), N);
    l2_weights(weight, weights.data(), (last - first) * N, weights.data());
    weight = weights.data();
  }
  if (call.grad_x) x_sums.assign(x.sums_size(), A(0));
  cost_backward_rows(x, 0, last - first, y, weight, N, call.grad_x ? x_sums.data() : nullptr, y_sums);
  if (call.grad_x) write_gradient(pairs.x, b, first, x, x_sums.data(), call.grad_x);
}

// Threads share problems where there are enough of them, else slabs. The sums for y of a problem's slabs are added in
// their order either way.
template <class A>
void backward(const PairwiseCostBackward& call, const Parallel& parallel) {
  const FeaturePairs& pairs = call.pairs;
  const int64_t N = pairs.y.rows, slabs = slabs_of(pairs.x.rows);
  if (pairs.x.rows == 0 || N == 0 || pairs.width == 0) {
    if (call.grad_x) write_zeros(pairs, pairs.x, call.grad_x);
    if (call.grad_y) write_zeros(pairs, pairs.y, call.grad_y);
    return;
  }
  const int64_t grain = slabs_worth_a_thread(pairs);
  if (pairs.problems >= call.threads) {
    parallel(pairs.problems, (grain + slabs - 1) / slabs, [&](int64_t first, int64_t last) {
      BackwardScratch<A> scratch(pairs.metric);
      Features<A> y(pairs.metric, Role::column);
      PartSums<A> y_sums;
      for (int64_t b = first; b < last; ++b) {
        read(pairs.y, pairs.width, b, 0, N, y);
        y_sums.start(slabs, call.grad_y ? y.sums_size() : 0, false);
        for (int64_t slab = 0; slab < slabs; ++slab) {
          backward_slab(call, b, slab, y, scratch, y_sums.begin(slab));
          y_sums.end();
        }
        if (call.grad_y) write_gradient(pairs.y, b, 0, y, y_sums.total(), call.grad_y);
      }
    });
    return;
  }
  Features<A> y(pairs.metric, Role::column);
  PartSums<A> y_sums;
  for (int64_t b = 0; b < pairs.problems; ++b) {
    read(pairs.y, pairs.width, b, 0, N, y);
    y_sums.start(slabs, call.grad_y ? y.sums_size() : 0, true);
    parallel(slabs, grain, [&](int64_t first, int64_t last) {
      BackwardScratch<A> scratch(pairs.metric);
      for (int64_t slab = first; slab < last; ++slab) {
        backward_slab(call, b, slab, y, scratch, y_sums.begin(slab));
        y_sums.end();
      }
    });
    if (call.grad_y) write_gradient(pairs.y, b, 0, y, y_sums.total(), call.grad_y);
  }
}

}  // namespace

extern const PairwiseCost pairwise_cost = {{forward<float>, forward<double>}, {backward<float>, backward<double>}};

}  // namespace mlot::MLOT_ISA
