// sinkhorn's gradient on a GPU: a cluster of blocks goes back over all steps of one problem in one launch.
#include "mlot/cuda/sinkhorn.h"
#include "mlot/cuda/transport_adjoint.h"

namespace mlot::cuda {
inline namespace sinkhorn_adjoint_kernels {

// Owns one problem with a cluster, each block a stretch of its rows: reads its costs (four times, once more for each
// base, and in every step where the tile does not hold all rows), the histories and the upstream gradients; writes all
// gradients. dl/dC is added up where it is written, once for each base.
template <class T, bool kOnChip>
__global__ void __launch_bounds__(kTransportThreads, 1)
    differentiate(SinkhornBackward call, Steps<Accumulator<T>> steps, TransportShape shape, void* room) {
  using A = Accumulator<T>;
  MLOT_SHARED_MEMORY(TransportMemory<A>, shared);
  Problem<T, kOnChip> problem(call.options, shape, 0, shared, room);
  problem.read(call.cost);
  A* const grad_cost = static_cast<A*>(call.grad_cost) + problem.at_row(0) * problem.columns;
  Adjoint<T, kOnChip>(call, steps, problem, grad_cost).differentiate();
  cluster_sync();  // others read this block's parts
}

// Owns one problem with a cluster: reads its costs once, writes dl/dC.
template <class T, bool kOnChip>
__global__ void __launch_bounds__(kTransportThreads, 1)
    envelope(SinkhornBackward call, TransportShape shape, void* room) {
  using A = Accumulator<T>;
  MLOT_SHARED_MEMORY(TransportMemory<A>, shared);
  Problem<T, kOnChip> problem(call.options, shape, 0, shared, room);
  problem.read(call.cost);
  write_envelope(call, problem, static_cast<A*>(call.grad_cost) + problem.at_row(0) * problem.columns);
}

template <class A>
TransportShape adjoint_shape(const TransportOptions& options) {
  return shape_of_problem<A>(options, kAdjointArrays);
}

template <class A>
int64_t adjoint_room(const TransportOptions& options) {
  return adjoint_shape<A>(options).room_of_workspaces(options.problems) + Steps<A>::bytes(options);
}

template <class T>
void launch_backward(const SinkhornBackward& call, void* room, void* stream) {
  using A = Accumulator<T>;
  const TransportOptions& options = call.options;
  const TransportShape shape = adjoint_shape<A>(options);
  const Shape grid = launch_shape<A>(options.problems, shape);
  if (options.gradient == TransportGradient::envelope) {
    launch(shape.on_chip ? envelope<T, true> : envelope<T, false>, grid, stream, call, shape, room);
    return;
  }
  const Steps<A> steps(options, static_cast<char*>(room) + shape.room_of_workspaces(options.problems));
  launch(shape.on_chip ? differentiate<T, true> : differentiate<T, false>, grid, stream, call, steps, shape, room);
}

}  // namespace sinkhorn_adjoint_kernels

int64_t sinkhorn_backward_room(const TransportOptions& options, int64_t accumulator) {
  return accumulator == 8 ? adjoint_room<double>(options) : adjoint_room<float>(options);
}

void (*const sinkhorn_backward[4])(const SinkhornBackward&, void*, void*) = {
    launch_backward<float>, launch_backward<bfloat16>, launch_backward<float16>, launch_backward<double>};

}  // namespace mlot::cuda
