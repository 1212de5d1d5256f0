// transport_cost's gradient on a GPU: a cluster of blocks makes the L1 costs of one problem once more, goes back over
// all steps and hands dl/dC on to the features, in one launch.
#include "mlot/cuda/l1_cost.h"
#include "mlot/cuda/transport_adjoint.h"
#include "mlot/cuda/transport_cost.h"

namespace mlot::cuda {
inline namespace transport_cost_adjoint_kernels {

constexpr TransportArrays kArrays{kAdjointArrays.of_columns, kAdjointArrays.of_rows, 2};

// Owns one problem with a cluster, each block a stretch of its rows: keeps its rows of the costs and of dl/dC in shared
// memory or, where they do not fit, in `room`. Each block writes the gradient of its rows of x, and of a share of y's
// rows, for which it reads all blocks' dl/dC.
template <class T, bool kOnChip, bool kEnvelope>
__global__ void __launch_bounds__(kTransportThreads, 1)
    differentiate(TransportCostBackward call, Steps<Accumulator<T>> steps, TransportShape shape, int64_t first,
                  void* room) {
  using A = Accumulator<T>;
  MLOT_SHARED_MEMORY(TransportMemory<A>, shared);
  Problem<A, kOnChip> problem(call.transport.options, shape, first, shared, room);
  A* const costs = problem.matrix(0, room);
  write_l1_costs(problem, Features<T>(call.x, problem.number), Features<T>(call.y, problem.number), call.width, costs);
  problem.read(costs);
  if constexpr (kEnvelope) {
    write_envelope(call.transport, problem, problem.matrix(1, room));
  } else {
    Adjoint<A, kOnChip>(call.transport, steps, problem, problem.matrix(1, room)).differentiate();
  }
  cluster_sync();
  const A* const grad_cost = problem.matrix(1, room);
  const Features<T> x(call.x, problem.number), y(call.y, problem.number);
  if (call.grad_x) {
    T* const gradient = static_cast<T*>(call.grad_x) + problem.number * problem.options.rows * call.width;
    write_gradient_of_rows(problem, x, y, call.width, grad_cost, gradient);
  }
  if (call.grad_y) {
    T* const gradient = static_cast<T*>(call.grad_y) + problem.number * problem.columns * call.width;
    write_gradient_of_columns(problem, x, y, call.width, grad_cost, gradient);
  }
  cluster_sync();
}

template <class A>
TransportShape adjoint_shape(const TransportOptions& options) {
  return shape_of_problem<A>(options, kArrays);
}

// The workspaces' part of the room.
template <class A>
int64_t workspaces_room(const TransportOptions& options, const TransportShape& shape) {
  return (shape.room(options, shape.problems_at_once(options), sizeof(A)) + 15) / 16 * 16;
}

template <class A>
int64_t adjoint_room(const TransportOptions& options) {
  return workspaces_room<A>(options, adjoint_shape<A>(options)) + Steps<A>::bytes(options);
}

template <class T, bool kEnvelope>
void launch_adjoint(const TransportCostBackward& call, void* room, void* stream) {
  using A = Accumulator<T>;
  const TransportOptions& options = call.transport.options;
  const TransportShape shape = adjoint_shape<A>(options);
  const Steps<A> steps(options, static_cast<char*>(room) + workspaces_room<A>(options, shape));
  for_problems(options, shape, [&](int64_t first, int64_t problems) {
    launch(shape.on_chip ? differentiate<T, true, kEnvelope> : differentiate<T, false, kEnvelope>,
           launch_shape<A>(problems, shape), stream, call, steps, shape, first, room);
  });
}

template <class T>
void launch_backward(const TransportCostBackward& call, void* room, void* stream) {
  if (call.transport.options.gradient == TransportGradient::envelope) {
    launch_adjoint<T, true>(call, room, stream);
  } else {
    launch_adjoint<T, false>(call, room, stream);
  }
}

}  // namespace transport_cost_adjoint_kernels

int64_t transport_cost_backward_room(const TransportOptions& options, int64_t accumulator) {
  return accumulator == 8 ? adjoint_room<double>(options) : adjoint_room<float>(options);
}

void (*const transport_cost_backward[4])(const TransportCostBackward&, void*, void*) = {
    launch_backward<float>, launch_backward<bfloat16>, launch_backward<float16>, launch_backward<double>};

}  // namespace mlot::cuda
