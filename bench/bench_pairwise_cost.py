"""L1 costs of all pairs of rows; both sides ask for a gradient."""

from bench.baselines import transport
from bench.suite import Peer, Suite, nbytes, sized
from mlot_kernels import pairwise_cost
from mlot_kernels.ops.pairwise_cost.cases import large

SIZE = ("problems", "student_rows", "teacher_rows", "width")


def traffic(x, y):
    cost = x.shape[0] * x.shape[1] * y.shape[1] * 4
    return nbytes(x, y) + cost, 2 * nbytes(x, y) + cost


SUITE = Suite(
    "pairwise_cost",
    operators=("pairwise_cost",),
    inputs=large,
    leaves=(0, 1),
    ours=lambda x, y, backend: (pairwise_cost(x, y, backend=backend),),
    peers={
        "torch.cdist": Peer(transport.pairwise_l1),
        "torch.compile": Peer(transport.pairwise_l1_by_broadcasting, compiled=True, only_full=True),
    },
    traffic=traffic,
    sizes={
        "quick": sized(SIZE, (1, 256, 256, 50), (4, 256, 224, 50)),
        "full": sized(SIZE, (1, 256, 256, 50), (4, 256, 224, 50), (8, 256, 256, 50), (1, 1024, 1024, 50)),
    },
    gpu_sizes={
        "quick": sized(SIZE, (8, 256, 256, 50)),
        "full": sized(SIZE, (8, 256, 256, 50), (4, 1024, 1024, 50), (64, 64, 64, 50)),
    },
)


def test_pairwise_cost(take, measurement):
    take(measurement)
