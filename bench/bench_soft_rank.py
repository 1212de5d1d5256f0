"""Soft ranks of rows as the unions of two top-k sets make them, with their lengths."""

from bench.baselines import ranks
from bench.suite import Peer, Suite, nbytes, sized
from mlot_kernels import soft_rank
from mlot_kernels.ops.soft_rank.cases import large

SIZE = ("rows", "width")


def traffic(values, lengths):
    result = values.numel() * 4  # of ranks, their gradient, and each of the two indices that backward reads
    return nbytes(values, lengths) + 3 * result, nbytes(values) + 3 * result


SUITE = Suite(
    "soft_rank",
    operators=("soft_rank",),
    inputs=large,
    leaves=(0,),
    ours=lambda values, lengths, backend: (soft_rank(values, lengths, backend=backend),),
    peers={"loop": Peer(ranks.soft_rank_by_rows, waits=True)},
    traffic=traffic,
    sizes={
        "quick": sized(SIZE, (4096, 20), (4096, 64)),
        "full": sized(SIZE, (4096, 16), (4096, 20), (4096, 64), (256, 1000)),
    },
    gpu_sizes={
        "quick": sized(SIZE, (8192, 20)),
        "full": sized(SIZE, (8192, 20), (65_536, 20), (8192, 64)),
    },
)


def test_soft_rank(take, measurement):
    take(measurement)
