// sinkhorn on a GPU: a cluster of blocks solves one problem, all of its steps in one launch.
#include "mlot/cuda/sinkhorn.h"

#include "mlot/cuda/transport_solver.h"

namespace mlot::cuda {
inline namespace sinkhorn_kernels {

// Owns one problem with a cluster, each block a stretch of its rows: reads its costs (twice before step 2, once for the
// values, and as often as a D is made) and writes all of its outputs. A step is a reading of the tile by rows and one
// by columns. Column sums are added tile by tile, then over groups of threads and blocks, in their order.
template <class T, bool kOnChip>
__global__ void __launch_bounds__(kTransportThreads, 1) solve(SinkhornForward call, TransportShape shape, void* room) {
  using A = Accumulator<T>;
  MLOT_SHARED_MEMORY(TransportMemory<A>, shared);
  Problem<T, kOnChip> problem(call.options, shape, 0, shared, room);
  problem.read(call.cost);
  Solver<T, kOnChip>(call, problem).solve();
}

template <class A>
TransportShape solver_shape(const TransportOptions& options) {
  return shape_of_problem<A>(options, kSolverArrays);
}

template <class T>
void launch_forward(const SinkhornForward& call, void* room, void* stream) {
  using A = Accumulator<T>;
  const TransportShape shape = solver_shape<A>(call.options);
  launch(shape.on_chip ? solve<T, true> : solve<T, false>, launch_shape<A>(call.options.problems, shape), stream, call,
         shape, room);
}

}  // namespace sinkhorn_kernels

int64_t sinkhorn_forward_room(const TransportOptions& options, int64_t accumulator) {
  const TransportShape shape = accumulator == 8 ? solver_shape<double>(options) : solver_shape<float>(options);
  return shape.room_of_workspaces(options.problems);
}

void (*const sinkhorn_forward[4])(const SinkhornForward&, void*, void*) = {
    launch_forward<float>, launch_forward<bfloat16>, launch_forward<float16>, launch_forward<double>};

}  // namespace mlot::cuda
