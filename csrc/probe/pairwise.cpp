#include "mlot/cpu/pairwise.h"

#include "pairwise.h"

namespace mlot::MLOT_ISA {
namespace {

template <class A>
struct Sides {
  Features<A> x, y;

  explicit Sides(const FeatureTables<A>& tables) : x(tables.metric, Role::row), y(tables.metric, Role::column) {
    x.read(tables.x, tables.M, tables.D, tables.D, 1), y.read(tables.y, tables.N, tables.D, tables.D, 1);
  }
};

template <class A>
void costs(const FeatureTables<A>& tables, int64_t first, int64_t last, A* out) {
  const Sides<A> sides(tables);
  cost_rows(sides.x, first, last, sides.y, out, tables.N);
}

template <class A>
void gradient(const FeatureTables<A>& tables, int64_t first, int64_t last, const A* weights, A* out) {
  const Sides<A> sides(tables);
  std::vector<A> sums(size_t(sides.x.sums_size())), all_rows(size_t(tables.M * tables.D));
  cost_backward_rows(sides.x, first, last, sides.y, weights, tables.N, sums.data(), static_cast<A*>(nullptr));
  sides.x.write_gradient(sums.data(), all_rows.data());
  std::copy(all_rows.begin() + first * tables.D, all_rows.begin() + last * tables.D, out);
}

template <class A>
constexpr PairwiseRoutinesOf<A> kRoutines{costs<A>, gradient<A>};

}  // namespace

extern const PairwiseRoutines pairwise_routines = {kRoutines<float>, kRoutines<double>};

}  // namespace mlot::MLOT_ISA
