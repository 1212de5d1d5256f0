"""Twenty Sinkhorn iterations at epsilon 0.1 between unit marginals, and the gradient through all of them."""

from functools import partial

from bench.baselines import transport
from bench.suite import Peer, Suite, nbytes, sized
from mlot_kernels import sinkhorn
from mlot_kernels.ops.sinkhorn.cases import large

SIZE = ("problems", "student_rows", "teacher_rows")
EPSILON, ITERATIONS = 0.1, 20
SCALING = partial(transport.sinkhorn, epsilon=EPSILON, iterations=ITERATIONS)
BY_MATMUL = partial(transport.sinkhorn_by_matmul, epsilon=EPSILON, iterations=ITERATIONS)


def ours(cost, backend):
    return (sinkhorn(cost, epsilon=EPSILON, iterations=ITERATIONS, marginals="unit", backend=backend).cost,)


def uniform(cost):
    """The same between marginals of 1/M and 1/N, for peers that know no others."""
    return (sinkhorn(cost, epsilon=EPSILON, iterations=ITERATIONS, backend="reference").cost,)


SUITE = Suite(
    "sinkhorn",
    operators=("sinkhorn",),
    inputs=large,
    leaves=(0,),
    ours=ours,
    peers={
        "eager": Peer(SCALING),
        "eager, log domain": Peer(partial(transport.sinkhorn_in_log_domain, epsilon=EPSILON, iterations=ITERATIONS)),
        "torch.compile": Peer(BY_MATMUL, compiled=True, only_full=True),
        "POT": Peer(
            partial(transport.pot_sinkhorn, epsilon=EPSILON, iterations=ITERATIONS),
            truth=uniform,
            needs="ot",
            waits=True,
        ),
    },
    traffic=lambda cost: (nbytes(cost), 2 * nbytes(cost)),
    sizes={
        "quick": sized(SIZE, (1, 256, 256), (8, 64, 48), (1, 1024, 1024)),
        "full": sized(SIZE, (1, 256, 256), (8, 64, 48), (8, 256, 256), (1, 1024, 1024)),
    },
    gpu_sizes={
        "quick": sized(SIZE, (8, 256, 256), (64, 64, 48), (4, 1024, 1024)),
        "full": sized(SIZE, (8, 256, 256), (64, 64, 48), (64, 256, 256), (4, 1024, 1024)),
    },
)


def test_sinkhorn(take, measurement):
    take(measurement)
