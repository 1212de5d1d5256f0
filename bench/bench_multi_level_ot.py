"""The Multi-Level-OT loss of the paper, and what its authors published, which is another loss."""

from bench.losses import batch, dense, published, traffic
from bench.suite import TWO_SIDES, TWO_SIDES_GPU, Peer, Suite
from mlot_kernels import multi_level_ot_loss, official_multi_level_ot_loss


def eager(*inputs):
    return (dense(*inputs),)


SUITE = Suite(
    "multi_level_ot",
    operators=("rank_truncate", "transport_cost"),
    inputs=batch,
    leaves=(0,),
    ours=lambda *inputs, backend: (multi_level_ot_loss(*inputs, backend=backend),),
    peers={
        "eager": Peer(eager),
        "torch.compile": Peer(eager, compiled=True),
        "published": Peer(
            lambda *inputs: (published(*inputs),),
            truth=lambda *inputs: (official_multi_level_ot_loss(*inputs, backend="reference"),),
            waits=True,
        ),
    },
    traffic=traffic,
    logits=2,
    sizes=TWO_SIDES,
    gpu_sizes=TWO_SIDES_GPU,
)


def test_multi_level_ot(take, measurement):
    take(measurement)
