"""Fused losses against DistillKit's own classes, over all that a signal may be."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip(
    "distillkit", reason="what these tests hold ours against is DistillKit itself: pip install from its repository"
)

from distillkit import lossfuncs
from distillkit.lossfuncs import ALL_LOSS_CLASSES, LossFunctionBase, MissingProbabilityHandling
from distillkit.signals import DenseSignal, SparseSignal

from mlot_kernels import TeacherTopK, divergence_loss, ranking_loss
from mlot_kernels.integrations.distillkit import (
    FusedDivergenceLoss,
    FusedJSDLoss,
    FusedKLDLoss,
    FusedRankingLoss,
    FusedTVDLoss,
    patch_distillkit,
    unpatch_distillkit,
)

SHAPE = B, S, V, K = 3, 7, 40, 6
PAIRS = [
    (FusedKLDLoss, lossfuncs.KLDLoss),
    (FusedJSDLoss, lossfuncs.JSDLoss),
    (FusedTVDLoss, lossfuncs.TVDLoss),
]
HANDLINGS = list(MissingProbabilityHandling)


def logits(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(B, S, V, generator=draw), 3 * torch.randn(B, S, V, generator=draw)


def dense(teacher, temperature=1.0):
    return DenseSignal(generation_temperature=temperature, hidden_states=None, vocab_size=V, logits=teacher)


def sparse(teacher, temperature=1.0, *, log_values=True):
    values, ids = (teacher / temperature).log_softmax(-1).topk(K)
    if not log_values:
        values = values + torch.arange(S)[:, None]  # of rows that are not normalised
    return SparseSignal(
        generation_temperature=temperature,
        hidden_states=None,
        vocab_size=V,
        sparse_ids=ids,
        sparse_values=values,
        log_values=log_values,
    )


def mask():
    keep = torch.rand(B, S, 1, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[1] = False
    return keep


def value_and_gradient(loss, student, signal, **options):
    leaf = student.detach().clone().requires_grad_()
    value = loss(SimpleNamespace(logits=leaf), signal, **options)
    value.backward()
    return value.detach(), leaf.grad


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)  # theirs cuts off at 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_dense_equals_distillkit(ours, theirs, temperature):
    student, teacher = logits()
    for options in ({}, {"mask": mask()}, {"mask": mask(), "num_items_in_batch": 11}):
        arguments = student, dense(teacher)
        close(
            value_and_gradient(ours(temperature), *arguments, **options),
            value_and_gradient(theirs(temperature), *arguments, **options),
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("made_at", [1.0, 2.0])
@pytest.mark.parametrize("handling", HANDLINGS, ids=lambda handling: handling.value)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_sparse_equals_distillkit(ours, theirs, handling, made_at, temperature):
    student, teacher = logits()
    signal = sparse(teacher, made_at)
    options = {"mask": mask()}
    close(
        value_and_gradient(ours(temperature, handling), student, signal, **options),
        value_and_gradient(theirs(temperature, handling), student, signal, **options),
    )


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_sparse_logits_equal_distillkit(ours, theirs):
    student, teacher = logits()
    signal = sparse(teacher, log_values=False)
    close(value_and_gradient(ours(2.0), student, signal), value_and_gradient(theirs(2.0), student, signal))


def test_a_mask_of_two_dimensions_is_the_same():
    student, teacher = logits()
    loss, signal = FusedKLDLoss(1.0), sparse(teacher)
    close(
        value_and_gradient(loss, student, signal, mask=mask().squeeze(-1)),
        value_and_gradient(loss, student, signal, mask=mask()),
    )


def test_columns_that_a_server_did_not_give():
    student, teacher = logits()
    signal = sparse(teacher)
    fewer = sparse(teacher)
    fewer.sparse_ids, fewer.sparse_values = signal.sparse_ids.clone(), signal.sparse_values.clone()
    fewer.sparse_ids[..., -2:], fewer.sparse_values[..., -2:] = -1, float("-inf")
    signal.sparse_ids, signal.sparse_values = signal.sparse_ids[..., :-2], signal.sparse_values[..., :-2]
    for loss in (FusedKLDLoss(2.0), FusedJSDLoss(2.0, "symmetric_uniform")):
        close(value_and_gradient(loss, student, fewer), value_and_gradient(loss, student, signal))


def test_no_token_counts():
    student, teacher = logits()
    value, gradient = value_and_gradient(FusedKLDLoss(1.0), student, dense(teacher), mask=torch.zeros(B, S, 1).bool())
    assert value == 0
    assert (gradient == 0).all()


def test_other_divergences():
    student, teacher = logits()
    rows = mask().squeeze(-1)
    loss = FusedDivergenceLoss(kind="adaptive_kl", head=0.3)
    expected = divergence_loss(student, teacher, rows, rows, kind="adaptive_kl", head=0.3)
    torch.testing.assert_close(loss(SimpleNamespace(logits=student), dense(teacher), mask()), expected)


@pytest.mark.parametrize("handling", ["zero", "symmetric_uniform"])
def test_ranking(handling):
    student, teacher = logits()
    rows = mask().squeeze(-1)
    output = SimpleNamespace(logits=student)
    loss = FusedRankingLoss(handling, k=4)
    torch.testing.assert_close(loss(output, dense(teacher), mask()), ranking_loss(student, teacher, rows, rows, k=4))
    signal = sparse(teacher)
    tail = {"zero": "renormalize", "symmetric_uniform": "uniform"}[handling]
    known = TeacherTopK(signal.sparse_values, signal.sparse_ids, tail)
    torch.testing.assert_close(
        loss(output, signal, mask(), num_items_in_batch=9),
        ranking_loss(student, known, rows, rows, k=4, num_items_in_batch=9),
    )


def test_patched_and_back():
    before = list(ALL_LOSS_CLASSES)
    patch_distillkit()
    try:
        assert {FusedKLDLoss, FusedJSDLoss, FusedTVDLoss} <= set(ALL_LOSS_CLASSES)
        assert [cls.name() for cls in ALL_LOSS_CLASSES] == [cls.name() for cls in before]
    finally:
        unpatch_distillkit()
    assert before == ALL_LOSS_CLASSES


def test_distillkit_is_as_it_was_read():
    """A change there is a red test here, and not a user's wrong loss."""
    called = [
        "self",
        "student_outputs",
        "signal",
        "mask",
        "hidden_state_mapping",
        "num_items_in_batch",
    ]
    assert [*inspect.signature(LossFunctionBase.__call__).parameters] == called
    for ours, theirs in PAIRS:
        assert [*inspect.signature(ours.__call__).parameters] == called
        assert ours.name() == theirs.name()
        names = [*inspect.signature(theirs.__init__).parameters]
        assert names == ["self", "temperature", "missing_probability_handling", "sparse_chunk_length"]
        assert [*inspect.signature(ours.__init__).parameters] == names
        assert not ours(1.0).requires_hidden_states()
    assert [handling.value for handling in HANDLINGS] == ["zero", "symmetric_uniform"]
    assert [*inspect.signature(SparseSignal).parameters] == [
        "generation_temperature",
        "hidden_states",
        "vocab_size",
        "sparse_ids",
        "sparse_values",
        "log_values",
    ]
    assert [*inspect.signature(DenseSignal).parameters][3:] == ["logits"]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: FusedKLDLoss(0.0), ValueError, "temperature must be"),
        (lambda: FusedKLDLoss(1.0, "none"), ValueError, "missing_probability_handling must be one of 'zero'"),
        (lambda: FusedKLDLoss(1.0, sparse_chunk_length=8), ValueError, "sparse_chunk_length must be None, got 8"),
        (lambda: FusedDivergenceLoss(kind="kl"), ValueError, "kind must be one of"),
        (lambda: FusedDivergenceLoss(shift=1), TypeError, "shift is DistillKit's to say here, got 1"),
        (lambda: FusedRankingLoss(reduction="sum"), TypeError, "reduction is DistillKit's to say here"),
    ],
)
def test_bad_options_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_bad_signals_are_named():
    student, teacher = logits()
    output = SimpleNamespace(logits=student)
    with pytest.raises(ValueError, match=r"needs a signal made at temperature 1, got 2\.0"):
        FusedKLDLoss(1.0)(output, dense(teacher, 2.0))
    with pytest.raises(ValueError, match=r"RankingLoss needs a signal made at temperature 1, got 2\.0"):
        FusedRankingLoss(k=3)(output, sparse(teacher, 2.0))
    with pytest.raises(ValueError, match="must be 'zero' for a SparseSignal with log_values=False"):
        FusedKLDLoss(1.0, "symmetric_uniform")(output, sparse(teacher, log_values=False))
    with pytest.raises(ValueError, match="reverse_kl is infinite where"):
        FusedDivergenceLoss(kind="reverse_kl")(output, sparse(teacher))
