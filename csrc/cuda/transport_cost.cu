// transport_cost on a GPU: a cluster of blocks makes the L1 costs of one problem and solves it, in one launch.
#include "mlot/cuda/transport_cost.h"

#include "mlot/cuda/l1_cost.h"
#include "mlot/cuda/transport_solver.h"

namespace mlot::cuda {
inline namespace transport_cost_kernels {

constexpr TransportArrays kArrays{kSolverArrays.of_columns, kSolverArrays.of_rows, 1};

// Owns one problem with a cluster, each block a stretch of its rows: reads x's rows and all of y once, keeps its rows
// of the costs in shared memory or, where they do not fit, in `room`; writes all of the problem's outputs.
template <class T, bool kOnChip>
__global__ void __launch_bounds__(kTransportThreads, 1)
    solve(TransportCostForward call, TransportShape shape, int64_t first, void* room) {
  using A = Accumulator<T>;
  MLOT_SHARED_MEMORY(TransportMemory<A>, shared);
  Problem<A, kOnChip> problem(call.transport.options, shape, first, shared, room);
  A* const costs = problem.matrix(0, room);
  write_l1_costs(problem, Features<T>(call.x, problem.number), Features<T>(call.y, problem.number), call.width, costs);
  problem.read(costs);
  Solver<A, kOnChip>(call.transport, problem).solve();
}

template <class A>
TransportShape solver_shape(const TransportOptions& options) {
  return shape_of_problem<A>(options, kArrays);
}

template <class A>
int64_t solver_room(const TransportOptions& options) {
  const TransportShape shape = solver_shape<A>(options);
  return shape.room(options, shape.problems_at_once(options), sizeof(A));
}

template <class T>
void launch_forward(const TransportCostForward& call, void* room, void* stream) {
  using A = Accumulator<T>;
  const TransportOptions& options = call.transport.options;
  const TransportShape shape = solver_shape<A>(options);
  for_problems(options, shape, [&](int64_t first, int64_t problems) {
    launch(shape.on_chip ? solve<T, true> : solve<T, false>, launch_shape<A>(problems, shape), stream, call, shape,
           first, room);
  });
}

}  // namespace transport_cost_kernels

int64_t transport_cost_forward_room(const TransportOptions& options, int64_t accumulator) {
  return accumulator == 8 ? solver_room<double>(options) : solver_room<float>(options);
}

void (*const transport_cost_forward[4])(const TransportCostForward&, void*, void*) = {
    launch_forward<float>, launch_forward<bfloat16>, launch_forward<float16>, launch_forward<double>};

}  // namespace mlot::cuda
