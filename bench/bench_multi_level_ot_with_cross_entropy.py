"""What a training step computes from the logits: cross-entropy and the distillation loss, with the paper's weight."""

from torch.nn.functional import cross_entropy

from bench.baselines.rows import wide
from bench.losses import batch, dense, published, traffic
from bench.suite import TWO_SIDES, TWO_SIDES_GPU, Peer, Suite
from mlot_kernels import multi_level_ot_loss, official_multi_level_ot_loss


def with_cross_entropy(distillation, weight):
    def loss(student, teacher, student_labels, teacher_labels, **options):
        shifted = wide(student[:, :-1].flatten(0, 1))  # as models' own losses do
        supervised = cross_entropy(shifted, student_labels[:, 1:].flatten())
        return (supervised + weight * distillation(student, teacher, student_labels, teacher_labels, **options),)

    return loss


def official(*inputs):
    return official_multi_level_ot_loss(*inputs, backend="reference")


SUITE = Suite(
    "multi_level_ot_with_cross_entropy",
    operators=("rank_truncate", "transport_cost"),
    inputs=batch,
    leaves=(0,),
    ours=with_cross_entropy(multi_level_ot_loss, 0.15),
    peers={
        "eager": Peer(with_cross_entropy(dense, 0.15)),
        "torch.compile": Peer(with_cross_entropy(dense, 0.15), compiled=True, only_full=True),
        "published": Peer(with_cross_entropy(published, 1.5), truth=with_cross_entropy(official, 1.5), waits=True),
    },
    traffic=traffic,
    logits=2,
    sizes={kind: sizes[:1] for kind, sizes in TWO_SIDES.items()},
    gpu_sizes={kind: sizes[:1] for kind, sizes in TWO_SIDES_GPU.items()},
)


def test_multi_level_ot_with_cross_entropy(take, measurement):
    take(measurement)
