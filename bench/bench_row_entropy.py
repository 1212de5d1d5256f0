"""Entropy of each row of logits."""

from bench.baselines import rows
from bench.suite import ONE_SIDE, ONE_SIDE_GPU, Peer, Suite, nbytes
from mlot_kernels import row_entropy
from mlot_kernels.ops.row_entropy.cases import large

SUITE = Suite(
    "row_entropy",
    operators=("row_entropy",),
    inputs=large,
    leaves=(0,),
    ours=lambda logits, backend: (row_entropy(logits, backend=backend),),
    peers={
        "eager": Peer(rows.row_entropy),
        "torch.compile": Peer(rows.row_entropy, compiled=True, only_full=True),
        "torch.distributions": Peer(rows.row_entropy_by_categorical),
    },
    traffic=lambda logits: (nbytes(logits), 2 * nbytes(logits)),
    logits=1,
    sizes={**ONE_SIDE, "quick": ONE_SIDE["quick"][:1]},
    gpu_sizes=ONE_SIDE_GPU,
)


def test_row_entropy(take, measurement):
    take(measurement)
