"""The log-probability of one token per row."""

from bench.baselines import rows
from bench.suite import ONE_SIDE, ONE_SIDE_GPU, Peer, Suite, nbytes
from mlot_kernels import token_log_probability
from mlot_kernels.ops.token_log_probability.cases import large

SUITE = Suite(
    "token_log_probability",
    operators=("token_log_probability",),
    inputs=large,
    leaves=(0,),
    ours=lambda logits, tokens, backend: (token_log_probability(logits, tokens, backend=backend),),
    peers={
        "eager": Peer(rows.token_log_probability),
        "torch.compile": Peer(rows.token_log_probability, compiled=True, only_full=True),
        "torch.cross_entropy": Peer(rows.token_log_probability_by_cross_entropy),
    },
    traffic=lambda logits, tokens: (nbytes(logits), 2 * nbytes(logits)),
    logits=1,
    sizes={**ONE_SIDE, "quick": ONE_SIDE["quick"][:1]},
    gpu_sizes=ONE_SIDE_GPU,
)


def test_token_log_probability(take, measurement):
    take(measurement)
