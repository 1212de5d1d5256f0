"""The published Multi-Level-OT code and its equal here, at its latest revision."""

from bench.losses import batch, published, traffic
from bench.suite import TWO_SIDES, TWO_SIDES_GPU, Peer, Suite
from mlot_kernels import official_multi_level_ot_loss

SUITE = Suite(
    "official_multi_level_ot",
    operators=("rank_truncate", "transport_cost"),
    inputs=batch,
    leaves=(0,),
    ours=lambda *inputs, backend: (official_multi_level_ot_loss(*inputs, backend=backend),),
    peers={"published": Peer(lambda *inputs: (published(*inputs),), waits=True)},
    traffic=traffic,
    logits=2,
    sizes={kind: sizes[:1] for kind, sizes in TWO_SIDES.items()},
    gpu_sizes={kind: sizes[:1] for kind, sizes in TWO_SIDES_GPU.items()},
)


def test_official_multi_level_ot(take, measurement):
    take(measurement)
