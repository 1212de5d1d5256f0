// Sinkhorn's iteration on a CPU; compiled once per instruction set.
#include "mlot/cpu/sinkhorn.h"

#include "mlot/cpu/sinkhorn_backward.h"

namespace mlot::MLOT_ISA {
namespace {

template <class T, class A = Accumulator<T>>
void forward(const SinkhornForward& call, const Parallel& parallel) {
  const TransportOptions& options = call.options;
  over_problems<Workspace<A>>(options, parallel, [&](int64_t b, const Parallel* threads, Workspace<A>& work) {
    prepare(options, b, work.problem);
    const Slabs<A> slabs(work.problem.m, threads);
    if (work.problem.m > 0) read_cost<T>(call.cost, b, slabs, work.problem);
    A* plan = call.plan ? static_cast<A*>(call.plan) + b * options.rows * options.columns : nullptr;
    solve(options, call.outputs, b, slabs, work, plan);
  });
}

template <class A>
struct BackwardScratch {
  Workspace<A> work;
  AdjointScratch<A> adjoint;
};

template <class T, class A = Accumulator<T>>
void backward(const SinkhornBackward& call, const Parallel& parallel) {
  const TransportOptions& options = call.options;
  const int64_t M = options.rows, N = options.columns;
  over_problems<BackwardScratch<A>>(options, parallel, [&](int64_t b, const Parallel* threads, BackwardScratch<A>& s) {
    Problem<A>& p = s.work.problem;
    prepare(options, b, p);
    const Slabs<A> slabs(p.m, threads);
    A* out = static_cast<A*>(call.grad_cost) + b * M * N;
    if (p.m < M) std::fill_n(out, M * N, A(0));
    if (p.m > 0) read_cost<T>(call.cost, b, slabs, p);
    const A* grad_plan = call.grad_plan ? static_cast<const A*>(call.grad_plan) + b * M * N : nullptr;
    differentiate(options, call.upstream, call.saved, call.gradients, b, slabs, s.work, s.adjoint, grad_plan,
                  [&](int64_t first, int64_t last, const A* rows) {
                    for (int64_t i = first; i < last; ++i) {
                      p.columns.scatter(rows + (i - first) * p.width, out + p.rows.index[i] * N, N);
                    }
                  });
  });
}

}  // namespace

extern const Sinkhorn sinkhorn = {{forward<float>, forward<bfloat16>, forward<float16>, forward<double>},
                                  {backward<float>, backward<bfloat16>, backward<float16>, backward<double>}};

}  // namespace mlot::MLOT_ISA
