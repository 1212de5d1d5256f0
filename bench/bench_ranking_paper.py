"""The paper's objective: twice the ranking loss, and the forward KL, which reads the logits once more."""

from bench import bench_ranking, bench_row_divergence
from bench.suite import ONE_SIDE, ONE_SIDE_GPU, Suite
from mlot_kernels import RankingLoss
from mlot_kernels.ops.row_divergence.cases import large


def traffic(student, teacher):
    """What its two terms move, and nothing beside."""
    terms = (suite.traffic(student, teacher) for suite in (bench_ranking.SUITE, bench_row_divergence.SUITE))
    return tuple(sum(each) for each in zip(*terms, strict=True))


SUITE = Suite(
    "ranking_paper",
    operators=("topk_softmax", "soft_rank", "row_divergence"),
    inputs=large,
    leaves=(0,),
    ours=lambda student, teacher, backend: (RankingLoss.paper(reduction="none", backend=backend)(student, teacher),),
    traffic=traffic,
    logits=2,
    sizes=ONE_SIDE,
    gpu_sizes=ONE_SIDE_GPU,
)


def test_ranking_paper(take, measurement):
    take(measurement)
