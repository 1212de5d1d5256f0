"""Universal Logit Distillation, beside its authors' code and TRL's."""

from bench.baselines.trl_uld import trl_uld_loss
from bench.baselines.uld import dense_uld_loss, published_uld_loss
from bench.losses import batch, traffic
from bench.suite import TWO_SIDES, TWO_SIDES_GPU, Peer, Suite
from mlot_kernels import uld_loss


def eager(student, teacher, *labels):
    return (dense_uld_loss(student[:, :-1], teacher[:, :-1]),)


def trl(*inputs):
    return (trl_uld_loss(*inputs, shift=1),)


def published(student, teacher, *labels):
    return (published_uld_loss(student.float(), teacher.float(), *labels),)


SUITE = Suite(
    "uld",
    operators=("sorted_l1",),
    inputs=batch,
    leaves=(0,),
    ours=lambda *inputs, backend: (uld_loss(*inputs, backend=backend),),
    peers={
        "eager": Peer(eager, sorts=True),
        "torch.compile": Peer(eager, sorts=True, compiled=True, only_full=True),
        "published": Peer(published, sorts=True, waits=True),
        "TRL": Peer(trl, sorts=True, waits=True, needs="trl", only_full=True),
    },
    traffic=traffic,
    logits=2,
    sizes={**TWO_SIDES, "quick": TWO_SIDES["quick"][:1]},
    gpu_sizes=TWO_SIDES_GPU,
)


def test_uld(take, measurement):
    take(measurement)
