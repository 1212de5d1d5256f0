"""Divergences of the student's rows from the teacher's, where both have one vocabulary or share a part of theirs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.logits import Logits
from mlot_kernels.losses.common import (
    LogitsLoss,
    at_rows,
    check_backend,
    check_reduction,
    reduce,
    two_sides,
    vocabulary,
    weighted,
)
from mlot_kernels.ops.row_divergence import row_divergence
from mlot_kernels.ops.row_divergence.reference import KINDS
from mlot_kernels.rows import Rows, pair


def divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_labels: Tensor | Rows | None = None,
    teacher_labels: Tensor | Rows | None = None,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    head: float = 0.5,
    interpolation: float = 1.0,
    column_pairs: Tensor | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    shift: int = 1,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    token_weight: Tensor | None = None,
    return_components: bool = False,
    backend: str | None = None,
) -> Any:
    """A divergence of each paired row, as ``row_divergence`` has it; the mean is over tokens, not over sequences.

    Args:
        student_logits: ``[B, T_s, V]``, teacher_logits: ``[B, T_t, V]``; float16, bfloat16, float32 or float64, the two
            may differ in T and dtype, and with ``column_pairs`` in V. Lower precisions are computed in float32.
        student_labels, teacher_labels: which rows count: integers ``[B, T]`` (-100 is ignored), a bool mask ``[B, T]``,
            ``Rows``, or None for all. Row i of answer span r on one side is paired with row i of span r on the other; a
            sequence whose two sides have different numbers of spans gives NaN. Where both models read the same tokens,
            both are the same.
        kind, beta, skew, head, interpolation, column_pairs: see ``row_divergence``. TRL's ``GKDTrainer`` has
            ``kind="jsd"`` with its ``beta``.
        student_temperature, teacher_temperature: of the softmaxes. There is no factor T squared.
        shift: how far integer labels lie behind the rows that predict them: 1 as a model takes them, 0 for shifted
            ones.
        student_vocab_size, teacher_vocab_size: columns from here on are padding and take no part; None: all count.
        reduction: ``"none"`` ``[B, A]`` over the paired rows, ``"sum"``, or ``"mean"`` over them.
        num_items_in_batch: replaces the mean's denominator, which counts tokens, or adds up their weights.
        token_weight: ``[B, T_s]``, weights of the student's positions, which multiply and are the mean's.
        return_components: also return a dict of detached scalars: ``divergence``, reduced as the mean, and ``rows``,
            the number of paired rows.
        backend: run all operators on this backend or raise.

    Returns:
        The loss, float32 (float64 where either side is float64), differentiable with respect to both sides' logits; or
        ``(loss, components)``.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or value.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    _check_options(student_temperature, teacher_temperature, kind, shift)
    check_reduction(reduction, num_items_in_batch)
    two_sides(student_logits, teacher_logits, token_weight)
    pairs = pair(
        Rows.of(student_labels, student_logits, shift=shift, name="student_labels"),
        Rows.of(teacher_labels, teacher_logits, shift=shift, name="teacher_labels"),
    )
    student, teacher = (
        Logits(logits, rows, temperature, vocab_size=vocabulary(f"{side}_vocab_size", size, logits))
        for side, logits, rows, temperature, size in (
            ("student", student_logits, pairs.student, student_temperature, student_vocab_size),
            ("teacher", teacher_logits, pairs.teacher, teacher_temperature, teacher_vocab_size),
        )
    )
    each = row_divergence(
        student,
        teacher,
        kind=kind,
        beta=beta,
        skew=skew,
        head=head,
        interpolation=interpolation,
        column_pairs=column_pairs,
        backend=backend,
    )  # [B, A]
    weight = at_rows(token_weight, pairs.student, each)
    if weight is None:
        weight = pairs.student.counted.to(each.dtype)
    each = weighted(each, weight).masked_fill(pairs.mismatched[:, None], float("nan"))
    loss = reduce(each, weight, reduction, num_items_in_batch)
    if not return_components:
        return loss
    return loss, {
        "divergence": reduce(each.detach(), weight, "mean", num_items_in_batch),
        "rows": pairs.student.count.sum(),
    }


def _check_options(student_temperature: float, teacher_temperature: float, kind: str, shift: int) -> None:
    checks.number("student_temperature", student_temperature, above=0)
    checks.number("teacher_temperature", teacher_temperature, above=0)
    checks.choice("kind", kind, KINDS)
    checks.integer("shift", shift, 0)


class DivergenceLoss(LogitsLoss):
    """A divergence of tokens' distributions as a module; the options are those of ``divergence_loss``."""

    def __init__(
        self,
        kind: str = "forward_kl",
        *,
        beta: float = 0.5,
        skew: float = 0.1,
        head: float = 0.5,
        interpolation: float = 1.0,
        column_pairs: Tensor | None = None,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        shift: int = 1,
        student_vocab_size: int | None = None,
        teacher_vocab_size: int | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        _check_options(student_temperature, teacher_temperature, kind, shift)
        check_reduction(reduction)
        check_backend(backend)
        super().__init__(
            divergence_loss,
            kind=kind,
            beta=beta,
            skew=skew,
            head=head,
            interpolation=interpolation,
            column_pairs=column_pairs,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            shift=shift,
            student_vocab_size=student_vocab_size,
            teacher_vocab_size=teacher_vocab_size,
            reduction=reduction,
            backend=backend,
        )
