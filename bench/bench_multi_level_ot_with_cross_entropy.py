"""What a training step computes from the logits: cross-entropy and the distillation loss, with the paper's weight."""

from torch.nn.functional import cross_entropy

from bench.baselines.multi_level_ot import dense_paper_loss, published_loss
from bench.losses import batch, traffic
from bench.suite import TWO_SIDES, TWO_SIDES_GPU, Peer, Suite
from mlot_kernels import multi_level_ot_loss, official_multi_level_ot_loss


def with_cross_entropy(distillation, weight):
    def loss(student, teacher, student_labels, teacher_labels, **options):
        shifted = student[:, :-1].flatten(0, 1)
        wide = shifted if shifted.dtype.itemsize > 2 else shifted.float()  # as models' own losses do
        supervised = cross_entropy(wide, student_labels[:, 1:].flatten())
        return (supervised + weight * distillation(student, teacher, student_labels, teacher_labels, **options),)

    return loss


def dense(student, teacher, *labels):
    return dense_paper_loss(student[:, :-1], teacher[:, :-1])


def published(student, teacher, *labels):
    return published_loss(student.float(), teacher.float(), *labels)


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
