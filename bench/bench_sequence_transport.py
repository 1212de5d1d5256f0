"""Transport between two sequences of features, as the loss of projected hidden states has it."""

from bench.baselines import rows, transport
from bench.suite import Peer, Suite, nbytes, sized
from mlot_kernels import sequence_transport_loss
from mlot_kernels.ops.transport_cost.cases import large

SIZE = ("problems", "student_rows", "teacher_rows", "width")
EPSILON, ITERATIONS = 0.1, 20


def ours(x, y, backend):
    return (sequence_transport_loss(x, y, metric="cosine", epsilon=EPSILON, iterations=ITERATIONS, backend=backend),)


def eager(x, y):
    unit_x, unit_y = (z / z.norm(dim=-1, keepdim=True) for z in (rows.wide(x), rows.wide(y)))
    cost = 1 - unit_x @ unit_y.mT  # [B, M, N]
    (unit,) = transport.sinkhorn_by_matmul(cost, EPSILON, ITERATIONS)
    return ((unit / cost.shape[2]).mean(),)  # marginals of 1/M and 1/N scale the plan, and nothing else


SUITE = Suite(
    "sequence_transport",
    operators=("transport_cost",),
    inputs=large,
    leaves=(0, 1),
    ours=ours,
    peers={
        "eager": Peer(eager),
        "torch.compile": Peer(eager, compiled=True, only_full=True),
    },
    traffic=lambda x, y: (nbytes(x, y), 2 * nbytes(x, y)),
    sizes={
        "quick": sized(SIZE, (4, 128, 112, 768)),
        "full": sized(SIZE, (4, 128, 112, 768), (2, 512, 512, 2048)),
    },
    gpu_sizes={
        "quick": sized(SIZE, (8, 256, 224, 2048)),
        "full": sized(SIZE, (8, 256, 224, 2048), (8, 1024, 896, 4096)),
    },
)


def test_sequence_transport(take, measurement):
    take(measurement)
