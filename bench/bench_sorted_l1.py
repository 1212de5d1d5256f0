"""The L1 distance of two rows' sorted probabilities; the teacher asks for no gradient."""

from bench.baselines import rows
from bench.suite import TWO_SIDES, TWO_SIDES_GPU, Peer, Suite, nbytes
from mlot_kernels import sorted_l1
from mlot_kernels.ops.sorted_l1.cases import large

SUITE = Suite(
    "sorted_l1",
    operators=("sorted_l1",),
    inputs=large,
    leaves=(0,),
    ours=lambda student, teacher, backend: (sorted_l1(student, teacher, backend=backend),),
    peers={
        "torch.sort": Peer(rows.sorted_l1, sorts=True),
        "torch.compile": Peer(rows.sorted_l1, sorts=True, compiled=True, only_full=True),
    },
    traffic=lambda student, teacher: (nbytes(student, teacher), 2 * nbytes(student)),
    logits=2,
    sizes=TWO_SIDES,
    gpu_sizes=TWO_SIDES_GPU,
)


def test_sorted_l1(take, measurement):
    take(measurement)
