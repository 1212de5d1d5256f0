"""The 50 largest log-probabilities of each row, and its log-sum-exp."""

from functools import partial

from torch import Tensor

from bench.baselines import rows
from bench.suite import ONE_SIDE, ONE_SIDE_GPU, Peer, Suite, nbytes
from mlot_kernels import TopK, topk_softmax
from mlot_kernels.ops.topk_softmax.cases import large

K = 50


def differentiable(top: TopK) -> tuple[Tensor, ...]:
    return top.log_probabilities, top.lse


SUITE = Suite(
    "topk_softmax",
    operators=("topk_softmax",),
    inputs=large,
    leaves=(0,),
    ours=lambda logits, backend: differentiable(topk_softmax(logits, K, backend=backend)),
    peers={
        "eager": Peer(partial(rows.topk_softmax, k=K), sorts=True),
        "torch.compile": Peer(partial(rows.topk_softmax, k=K), compiled=True, only_full=True, sorts=True),
        "torch.topk": Peer(partial(rows.topk_softmax_by_logsumexp, k=K), sorts=True),
    },
    traffic=lambda logits: (nbytes(logits), 2 * nbytes(logits)),
    logits=1,
    sizes=ONE_SIDE,
    gpu_sizes=ONE_SIDE_GPU,
)


def test_topk_softmax(take, measurement):
    take(measurement)
