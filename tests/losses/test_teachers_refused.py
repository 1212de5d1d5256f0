"""What a loss cannot do with a teacher that is no dense logits it refuses by name: README.md's table has the cells."""

import pytest
import torch

from mlot_kernels import (
    MultiLevelOTLoss,
    TeacherHidden,
    TeacherTopK,
    divergence_loss,
    hybrid_loss,
    multi_level_ot_loss,
    uld_loss,
)
from mlot_kernels.losses.official_multi_level_ot import official_multi_level_ot_loss
from tests.losses.examples import logits_of
from tests.losses.teachers import LABELS, B, K, T, V, hidden_of, top_k_of


def columns_free() -> TeacherTopK:
    return TeacherTopK(top_k_of("uniform")[0].log_probabilities)


REFUSED = {
    "divergence without columns": (divergence_loss, columns_free, {}, "needs TeacherTopK.columns"),
    "Multi-Level-OT without columns": (
        multi_level_ot_loss,
        columns_free,
        {"teacher_vocab_size": V},
        "needs TeacherTopK.columns",
    ),
    **{
        f"{kind}, renormalized": (
            divergence_loss,
            lambda: top_k_of("renormalize")[0],
            {"kind": kind, **options},
            "infinite where",
        )
        for kind, options in (
            ("reverse_kl", {}),
            ("adaptive_kl", {}),
            ("jsd", {"beta": 1.0}),
            ("skew_reverse_kl", {"skew": 0.0}),
        )
    },
    "pairs and a bucket": (
        divergence_loss,
        lambda: top_k_of("bucket")[0],
        {"column_pairs": torch.zeros(1, 2, dtype=torch.int64)},
        "column_pairs cannot be used",
    ),
    "a mixture and a bucket": (divergence_loss, lambda: top_k_of("bucket")[0], {"interpolation": 0.5}, "mixes logits"),
    "another vocabulary": (
        divergence_loss,
        lambda: top_k_of("renormalize")[0],
        {"teacher_vocab_size": V + 1},
        "vocabularies of one size",
    ),
    "a bucket at a temperature": (
        divergence_loss,
        lambda: top_k_of("bucket")[0],
        {"teacher_temperature": 2.0},
        "needs teacher_temperature=1",
    ),
    "ULD, a bucket at a temperature": (
        uld_loss,
        lambda: top_k_of("bucket")[0],
        {"teacher_temperature": 2.0, "teacher_vocab_size": V},
        "needs teacher_temperature=1",
    ),
    "ULD, a tail of no width": (uld_loss, lambda: top_k_of("uniform")[0], {}, "needs teacher_vocab_size"),
    "ULD, more than the bucket knows": (
        uld_loss,
        lambda: top_k_of("bucket")[0],
        {"teacher_vocab_size": V, "top_k": K + 1},
        "top_k must be at least 1 and at most 5",
    ),
    "Multi-Level-OT of no width": (multi_level_ot_loss, lambda: top_k_of("uniform")[0], {}, "needs teacher_vocab_size"),
    "Multi-Level-OT and a bucket": (
        multi_level_ot_loss,
        lambda: top_k_of("bucket")[0],
        {"teacher_vocab_size": V},
        "probability of single columns",
    ),
    "Multi-Level-OT, more than a row knows": (
        multi_level_ot_loss,
        lambda: top_k_of("uniform")[0],
        {"teacher_vocab_size": V, "scope": "token", "k": K + 1},
        "the K of TeacherTopK",
    ),
    "Multi-Level-OT, all sequences' hidden states": (
        multi_level_ot_loss,
        lambda: hidden_of()[0],
        {"scope": "batch"},
        "ranks all sequences together",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    loss, teacher, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        loss(logits_of(B, T, V), teacher(), *LABELS, **options)


@pytest.mark.parametrize("form", [lambda: hidden_of()[0], lambda: top_k_of("uniform")[0]], ids=["hidden", "top-k"])
def test_the_published_loss_takes_logits_alone(form):
    with pytest.raises(TypeError, match=r"must be a tensor, got Teacher.* the published code reads every column"):
        official_multi_level_ot_loss(logits_of(B, T, V), form(), *LABELS)
    with pytest.raises(TypeError, match="must be a tensor, got Teacher"):
        MultiLevelOTLoss.official()(logits_of(B, T, V), form(), *LABELS)


@pytest.mark.parametrize("form", [lambda: hidden_of()[0], lambda: top_k_of("uniform")[0]], ids=["hidden", "top-k"])
def test_the_hybrid_loss_takes_logits_alone(form):
    pairs = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"must be a tensor, got Teacher.* reads the teacher's rows in two ways"):
        hybrid_loss(logits_of(B, T, V), form(), *LABELS, column_pairs=pairs)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TeacherTopK(torch.zeros(2, 3)), ValueError, "must be \\[B, T, K\\]"),
        (lambda: TeacherTopK(torch.zeros(2, 3, 0)), ValueError, "at least one column"),
        (lambda: TeacherTopK(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5).long()), ValueError, "columns must be"),
        (
            lambda: TeacherTopK(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)),
            TypeError,
            "columns must be one of torch.int64",
        ),
        (lambda: TeacherTopK(torch.zeros(2, 3, 4), tail="drop"), ValueError, "tail must be one of"),
        (lambda: TeacherTopK(torch.zeros(2, 3, 4, requires_grad=True)), ValueError, "gets no gradient"),
        (lambda: TeacherHidden(torch.zeros(2, 3, 4), torch.zeros(9, 5)), ValueError, "weight must be"),
        (lambda: TeacherHidden(torch.zeros(2, 3, 4), torch.zeros(9, 4).double()), TypeError, "weight must be one of"),
        (lambda: TeacherHidden(torch.zeros(2, 3, 4), torch.zeros(9, 4), torch.zeros(8)), ValueError, "bias must be"),
        (
            lambda: TeacherHidden(torch.zeros(2, 3, 4), torch.zeros(9, 4), softcap=0.0),
            ValueError,
            "softcap must be above 0",
        ),
        (
            lambda: TeacherHidden(torch.zeros(2, 3, 4), torch.zeros(9, 4), block_rows=0),
            ValueError,
            "block_rows must be",
        ),
        (lambda: TeacherHidden(torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(9, 4)), ValueError, "no gradient"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused_when_it_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()
