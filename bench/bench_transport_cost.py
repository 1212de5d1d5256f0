"""Transport between features by L1 costs: twenty Sinkhorn iterations, the cost matrix among them."""

from functools import partial

from bench.baselines import transport
from bench.suite import Peer, Suite, nbytes, sized
from mlot_kernels import transport_cost
from mlot_kernels.ops.transport_cost.cases import large

SIZE = ("problems", "student_rows", "teacher_rows", "width")
EPSILON, ITERATIONS = 0.1, 20


def ours(x, y, backend):
    solved = transport_cost(x, y, epsilon=EPSILON, iterations=ITERATIONS, marginals="unit", backend=backend)
    return (solved.cost,)


def eager(x, y):
    return transport.sinkhorn(*transport.pairwise_l1(x, y), EPSILON, ITERATIONS)


def compilable(x, y):
    """In the forms that the compiler makes the fastest."""
    return transport.sinkhorn_by_matmul(*transport.pairwise_l1_by_broadcasting(x, y), EPSILON, ITERATIONS)


def converged(x, y):
    """GeomLoss anneals epsilon and stops by a rule of its own: its value is that of the iteration's end."""
    return (transport_cost(x, y, epsilon=EPSILON, iterations=500, backend="reference").regularized_cost,)


SUITE = Suite(
    "transport_cost",
    operators=("transport_cost",),
    inputs=large,
    leaves=(0, 1),
    ours=ours,
    peers={
        "eager": Peer(eager),
        "torch.compile": Peer(compilable, compiled=True, only_full=True),
        "GeomLoss": Peer(
            partial(transport.geomloss_regularized, epsilon=EPSILON),
            truth=converged,
            needs="geomloss",
            waits=True,
            inexact=0.02,  # at its default, scaling=0.5; its gradient is off by as much as itself there
        ),
    },
    traffic=lambda x, y: (nbytes(x, y), 2 * nbytes(x, y)),
    sizes={
        "quick": sized(SIZE, (2, 256, 224, 50)),
        "full": sized(SIZE, (2, 256, 224, 50), (8, 64, 48, 50), (8, 256, 256, 50), (1, 1024, 1024, 50)),
    },
    gpu_sizes={
        "quick": sized(SIZE, (8, 256, 256, 50)),
        "full": sized(SIZE, (8, 256, 256, 50), (64, 64, 48, 50), (4, 1024, 1024, 50)),
    },
)


def test_transport_cost(take, measurement):
    take(measurement)
