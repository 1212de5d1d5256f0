"""The generalised Jensen-Shannon divergence of two rows; the teacher asks for no gradient."""

from bench.baselines import rows
from bench.baselines.trl_gkd import trl_jsd
from bench.suite import ONE_SIDE, ONE_SIDE_GPU, Peer, Suite, nbytes
from mlot_kernels import row_divergence
from mlot_kernels.ops.row_divergence.cases import large

SUITE = Suite(
    "row_divergence",
    operators=("row_divergence",),
    inputs=large,
    leaves=(0,),
    ours=lambda student, teacher, backend: (row_divergence(student, teacher, kind="jsd", backend=backend),),
    peers={
        "eager": Peer(rows.jsd),
        "torch.compile": Peer(rows.jsd, compiled=True, only_full=True),
        "TRL": Peer(trl_jsd, needs="trl", only_full=True),
    },
    traffic=lambda student, teacher: (nbytes(student, teacher), 2 * nbytes(student) + nbytes(teacher)),
    logits=2,
    sizes=ONE_SIDE,
    gpu_sizes=ONE_SIDE_GPU,
)


def test_row_divergence(take, measurement):
    take(measurement)
