"""FusedLinearDistillationLoss inside the installed Liger, against whole logits and against Liger's own loss."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

pytest.importorskip("liger_kernel", reason="what these tests run in is Liger itself: pip install -e '.[liger]'")

from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from liger_kernel.chunked_loss.fused_linear_distillation import LigerFusedLinearDistillationBase
from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

from mlot_kernels import Rows, divergence_loss, ranking_loss, row_divergence, uld_loss
from mlot_kernels.integrations.liger import (
    _OPTIONS,
    LOSSES,
    FusedLinearDistillationFunction,
    FusedLinearDistillationLoss,
)
from mlot_kernels.ops.row_divergence.reference import KINDS

CHUNK_SIZES = (5, 16)


def problem(student_vocab=41, teacher_vocab=41, *, dtype=torch.float64, rows=37, seed=0):
    """Hidden states, heads and biases of both sides, in the order of ``forward``; some labels are ignored."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, student_vocab, (rows,), generator=draw)
    labels[:4] = labels[20:23] = -100
    sides = normal(rows, 8), normal(student_vocab, 8), normal(rows, 12), normal(teacher_vocab, 12)
    return *sides, labels, normal(student_vocab), normal(teacher_vocab)


def value_and_gradients(loss, arguments, bias=True):
    """The value, and the gradients of the student's hidden states, head and bias."""
    arguments = [*arguments] if bias else [*arguments[:5], None, None]
    for i in (0, 1, 5):
        if arguments[i] is not None:
            arguments[i] = arguments[i].detach().clone().requires_grad_()
    value = loss(*arguments)
    (3 * value).backward()
    return [value.detach(), *(arguments[i].grad for i in (0, 1, 5) if arguments[i] is not None)]


def whole(soft, *, hard=0.5, temperature=1.0):
    """Cross-entropy and a distillation loss of logits that are made whole."""

    def loss(h, w, teacher_h, teacher_w, labels, bias=None, teacher_bias=None):
        student, teacher = functional.linear(h, w, bias), functional.linear(teacher_h, teacher_w, teacher_bias)
        crossentropy = functional.cross_entropy(student, labels)
        return hard * crossentropy + 0.5 * soft(student / temperature, teacher / temperature, labels)

    return loss


def of_tokens(function, **options):
    """A loss function whose mean is over rows, each of them a sequence of its own."""

    def loss(student, teacher, labels):
        rows = labels[:, None]
        return function(student[:, None], teacher[:, None], rows, rows, shift=0, **options)

    return loss


def close(ours, expected, **tolerance):
    torch.testing.assert_close(ours[0], expected[0].to(ours[0].dtype), rtol=1e-6, atol=1e-6)  # Liger adds in float32
    for a, b in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def extra(kind):
    """Options of a kind that are not at their defaults."""
    return {"jsd": {"beta": 0.3}, "skew_kl": {"skew": 0.2}, "skew_reverse_kl": {"skew": 0.2}}.get(kind, {})


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_divergences_equal_whole_logits(kind, bias, chunk_size):
    loss = FusedLinearDistillationLoss(kind, temperature=1.5, chunk_size=chunk_size, **extra(kind))
    expected = whole(of_tokens(divergence_loss, kind=kind, **extra(kind)), temperature=1.5)
    arguments = problem()
    close(value_and_gradients(loss, arguments, bias), value_and_gradients(expected, arguments, bias))


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("sizes", [(41, 41), (41, 60), (60, 41)], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 7, "tail": "drop", "ties": "stable"}], ids=["all", "top 7"])
def test_uld_equals_whole_logits(options, sizes, chunk_size):
    """Above all where Liger gives the student columns that it does not have."""
    loss = FusedLinearDistillationLoss("uld", chunk_size=chunk_size, **options)
    arguments = problem(*sizes)
    close(value_and_gradients(loss, arguments), value_and_gradients(whole(of_tokens(uld_loss, **options)), arguments))


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("options", [{}, {"k": 4, "base": "forward_kl", "dynamic": True}], ids=["defaults", "Eq. 2"])
def test_ranking_equals_whole_logits(options, chunk_size):
    loss = FusedLinearDistillationLoss("ranking", chunk_size=chunk_size, **options)
    arguments = problem()
    close(
        value_and_gradients(loss, arguments), value_and_gradients(whole(of_tokens(ranking_loss, **options)), arguments)
    )


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "beta"), [("jsd", 0.5), ("jsd", 0.1), ("forward_kl", 0.0), ("reverse_kl", 1.0)])
def test_equals_liger(kind, beta, dtype, chunk_size):
    options = {"weight_hard_loss": 0.2, "weight_soft_loss": 0.7, "temperature": 2.0, "chunk_size": chunk_size}
    theirs = LigerFusedLinearJSDLoss(beta=beta, compiled=False, **options)
    ours = FusedLinearDistillationLoss(kind, **options, **({"beta": beta} if kind == "jsd" else {}))
    arguments = problem(dtype=dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {}
    close(value_and_gradients(ours, arguments), value_and_gradients(theirs, arguments), **tolerance)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "ranking"])
def test_padding_of_a_head_takes_no_part(kind):
    """Liger itself lets the student's logit 0 there meet the teacher's."""
    arguments = problem(41, 48)
    cut = (*arguments[:3], arguments[3][:41], *arguments[4:6], arguments[6][:41])
    loss = FusedLinearDistillationLoss(kind, chunk_size=8, teacher_vocab_size=41)
    close(
        value_and_gradients(loss, arguments),
        value_and_gradients(FusedLinearDistillationLoss(kind, chunk_size=8), cut),
    )
    both = FusedLinearDistillationLoss(kind, chunk_size=8, student_vocab_size=30, teacher_vocab_size=30)

    def first_columns(student, teacher, labels):
        if kind == "ranking":
            return of_tokens(ranking_loss)(student[:, :30], teacher[:, :30], labels)
        return of_tokens(divergence_loss, kind=kind)(student[:, :30], teacher[:, :30], labels)

    close(value_and_gradients(both, arguments), value_and_gradients(whole(first_columns), arguments))


def test_shared_columns_of_two_vocabularies():
    """Columns that both tokenizers have, where Liger has given the student more of them."""
    arguments = problem(41, 60)
    pairs = torch.stack((torch.arange(20), torch.arange(59, 39, -1)), 1)
    loss = FusedLinearDistillationLoss("forward_kl", chunk_size=8, column_pairs=pairs)
    expected = whole(of_tokens(divergence_loss, column_pairs=pairs))
    close(value_and_gradients(loss, arguments), value_and_gradients(expected, arguments))


def test_a_floor():
    def floored(student, teacher, labels):
        rows = Rows.from_mask((labels != -100)[None], spans="one")
        each = row_divergence(student[None, rows.index[0]], teacher[None, rows.index[0]], floor=1e-3)
        return each[rows.counted].mean()

    loss = FusedLinearDistillationLoss("forward_kl", chunk_size=8, floor=1e-3)
    arguments = problem()
    close(value_and_gradients(loss, arguments), value_and_gradients(whole(floored), arguments))


def test_parts_are_reported_and_have_no_gradient():
    arguments = problem()
    total, soft, hard = FusedLinearDistillationLoss("uld", chunk_size=8, return_soft_hard_loss=True)(
        arguments[0].requires_grad_(), *arguments[1:]
    )
    assert total.requires_grad
    assert not soft.requires_grad
    assert not hard.requires_grad
    torch.testing.assert_close(total, 0.5 * soft + 0.5 * hard)
    only = FusedLinearDistillationLoss("uld", chunk_size=8, weight_hard_loss=0.0, weight_soft_loss=1.0)(*arguments)
    torch.testing.assert_close(only, soft)


def test_no_label_counts():
    arguments = problem()
    arguments[4][:] = -100
    value, *gradients = value_and_gradients(FusedLinearDistillationLoss("uld"), arguments)
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_sixteen_bits():
    arguments = problem(dtype=torch.bfloat16)
    expected = value_and_gradients(
        whole(of_tokens(uld_loss)), [x.double() if x.is_floating_point() else x for x in arguments]
    )
    value, *gradients = value_and_gradients(FusedLinearDistillationLoss("uld", chunk_size=16), arguments)
    torch.testing.assert_close(value.double(), expected[0], rtol=2e-2, atol=0)
    for a, b in zip(gradients, expected[1:], strict=True):
        assert a.dtype == torch.bfloat16
        # Probabilities that are next to equal change places, and the sign of their gradient, by a rounding of a logit.
        assert functional.cosine_similarity(a.double().flatten(), b.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("kind", ["jsd", "uld"])
def test_compiled(kind):
    arguments = problem(rows=16, dtype=torch.float32)
    eager = value_and_gradients(FusedLinearDistillationLoss(kind, chunk_size=8), arguments)
    compiled = value_and_gradients(FusedLinearDistillationLoss(kind, chunk_size=8, compiled=True), arguments)
    close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_liger_is_as_it_was_read():
    """A change there is a red test here, and not a user's wrong loss."""
    base = LigerFusedLinearDistillationBase
    assert [*inspect.signature(base.distillation_loss_fn).parameters] == [
        "student_logits",
        "teacher_logits",
        "target",
        "ignore_index",
    ]
    assert [*inspect.signature(base.forward).parameters] == [
        "cls",
        "ctx",
        "student_input",
        "student_weight",
        "teacher_input",
        "teacher_weight",
        "target",
        "student_bias",
        "teacher_bias",
        "chunk_size",
        "ignore_index",
        "weight_hard_loss",
        "weight_soft_loss",
        "beta",
        "compute_ce_loss",
        "temperature",
        "compiled",
        "return_soft_hard_loss",
        "loss_kwargs",
    ]
    assert [*inspect.signature(LigerFusedLinearJSDLoss.forward).parameters] == [
        *inspect.signature(FusedLinearDistillationLoss.forward).parameters
    ]
    theirs = inspect.signature(LigerFusedLinearJSDLoss.__init__).parameters
    ours = inspect.signature(FusedLinearDistillationLoss.__init__).parameters
    assert set(theirs) - set(ours) == {"beta"}  # an option of some losses here
    assert {name for name in theirs if name in ours and theirs[name].default != ours[name].default} == {"compiled"}
    # One gradient for each argument of apply, of which the first six are the base's.
    assert len(inspect.signature(FusedLinearDistillationFunction.forward).parameters) == 1 + 6 + 9
    assert len(inspect.signature(LigerFusedLinearJSDFunction.forward).parameters) == 1 + 6 + 9


def test_every_loss_has_its_options():
    assert set(_OPTIONS) == set(LOSSES)
    known = inspect.signature(row_divergence).parameters
    assert {name for kind in KINDS for name in _OPTIONS[kind]} == set(known) - {"student", "teacher", "kind", "backend"}
    of_ranking = inspect.signature(ranking_loss).parameters
    assert set(_OPTIONS["ranking"]) < set(of_ranking)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"loss": "kl"}, ValueError, "loss must be one of"),
        ({"loss": "uld", "beta": 0.5}, TypeError, "loss='uld' has the options ties, top_k, tail, got beta"),
        ({"loss": "forward_kl", "top_k": 3}, TypeError, "got top_k; leave"),
        ({"loss": "uld", "ties": "first"}, ValueError, "ties must be one of"),
        ({"temperature": 0.0}, ValueError, "temperature must be"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options_are_named(options, error, words):
    with pytest.raises(error, match=words):
        FusedLinearDistillationLoss(**options)


def test_bad_input_is_named():
    arguments = problem(41, 48)
    with pytest.raises(ValueError, match=r"'jsd' needs vocabularies of one size, got 41 and 48; .* pass student_vocab"):
        FusedLinearDistillationLoss("jsd")(*arguments)
    with pytest.raises(ValueError, match="teacher_vocab_size must be"):
        FusedLinearDistillationLoss("jsd", teacher_vocab_size=49)(*arguments)
    loss = FusedLinearDistillationLoss("uld")
    with pytest.raises(ValueError, match=r"teacher_input must have a row for each of student_input, 37, got 30"):
        loss(*arguments[:2], arguments[2][:30], *arguments[3:])
    with pytest.raises(ValueError, match=r"student_input must be \[N, H\]"):
        loss(arguments[0][None], *arguments[1:])
    with pytest.raises(TypeError, match=r"true_labels must be one of torch\.int64"):
        loss(*arguments[:4], arguments[4].float(), *arguments[5:])


def test_two_tokenizers_as_the_documentation_has_it():
    page = Path(__file__).parents[2] / "docs" / "recipes" / "README.md"
    code = re.search(r"## Liger, with two tokenizers.*?```python\n(.*?)```", page.read_text(), re.DOTALL).group(1)
    torch.manual_seed(0)
    labels = (
        torch.tensor([[-100, -100, 3, 4, 5, -100], [-100, 1, 2, 3, 4, 5]]),
        torch.tensor([[-100, 7, 8, 9, 9], [-100, -100, 1, 2, -100]]),
    )
    names = {
        "student_labels": labels[0],
        "teacher_labels": labels[1],
        "student_hidden": torch.randn(2, 6, 8, requires_grad=True),
        "teacher_hidden": torch.randn(2, 5, 12),
        "student_head": torch.nn.Linear(8, 30, bias=False),
        "teacher_head": torch.nn.Linear(12, 44, bias=False),
    }
    exec(code, names)
    names["loss"].backward()
    student, teacher = (names[f"{side}_head"](names[f"{side}_hidden"]) for side in ("student", "teacher"))
    of_sequences = uld_loss(student, teacher, *labels, reduction="none")
    count = torch.tensor([3, 2])  # pairs of rows; an answer's rest has no partner
    crossentropy = functional.cross_entropy(torch.cat((student[0, 1:4], student[1, :2])), torch.tensor([3, 4, 5, 1, 2]))
    soft = (of_sequences * count).sum() / count.sum()
    torch.testing.assert_close(names["loss"], 0.5 * crossentropy + 0.5 * soft)
    assert names["student_hidden"].grad.isfinite().all()


def test_it_shows_its_options():
    assert "'jsd', weight_hard_loss=0.5" in repr(FusedLinearDistillationLoss("jsd", beta=0.3))
