"""The 50 columns of each sequence with the largest sums of probability, and the log-probabilities there."""

from functools import partial

from torch import Tensor

from bench.baselines import rows
from bench.suite import ONE_SIDE, ONE_SIDE_GPU, Peer, Suite, nbytes
from mlot_kernels import Ranked, rank_truncate
from mlot_kernels.ops.rank_truncate.cases import large

K = 50


def differentiable(ranked: Ranked) -> tuple[Tensor, ...]:
    return ranked.log_probabilities, ranked.kept_mass


SUITE = Suite(
    "rank_truncate",
    operators=("rank_truncate",),
    inputs=large,
    leaves=(0,),
    ours=lambda logits, backend: differentiable(rank_truncate(logits, k=K, backend=backend)),
    peers={
        "eager": Peer(partial(rows.rank_truncate, k=K, temperatures=(1.0,))),
        "torch.compile": Peer(partial(rows.rank_truncate, k=K, temperatures=(1.0,)), compiled=True, only_full=True),
    },
    traffic=lambda logits: (nbytes(logits), 2 * nbytes(logits)),
    logits=1,
    sizes=ONE_SIDE,
    gpu_sizes=ONE_SIDE_GPU,
)


def test_rank_truncate(take, measurement):
    take(measurement)
