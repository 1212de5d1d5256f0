"""The ranking loss over the union of both sides' top 5, duplicates kept, as the published code has it."""

from bench.baselines.ranking import published_ranking
from bench.suite import ONE_SIDE, ONE_SIDE_GPU, Peer, Suite, nbytes
from mlot_kernels import ranking_loss
from mlot_kernels.ops.row_divergence.cases import large

SUITE = Suite(
    "ranking",
    operators=("topk_softmax", "soft_rank"),
    inputs=large,
    leaves=(0,),
    ours=lambda student, teacher, backend: (
        ranking_loss(student, teacher, k=5, dedup="official", reduction="none", backend=backend),
    ),
    peers={
        # Which of equal 16-bit logits is the fifth, torch.topk says as it likes, and the other side's logit is another.
        "published": Peer(published_ranking, inexact=0.05),
        "torch.compile": Peer(published_ranking, inexact=0.05, compiled=True, only_full=True),
    },
    traffic=lambda student, teacher: (nbytes(student, teacher), nbytes(student)),
    logits=2,
    sizes=ONE_SIDE,
    gpu_sizes=ONE_SIDE_GPU,
)


def test_ranking(take, measurement):
    take(measurement)
