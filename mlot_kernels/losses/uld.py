"""Universal Logit Distillation (arXiv 2402.12030): the L1 distance of sorted probabilities."""

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
from mlot_kernels.ops.sorted_l1 import sorted_l1
from mlot_kernels.ops.sorted_l1.reference import TAILS, TIES
from mlot_kernels.rows import Rows, pair


def uld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_labels: Tensor | Rows | None = None,
    teacher_labels: Tensor | Rows | None = None,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    ties: str = "mean",
    top_k: int | None = None,
    tail: str = "bucket",
    shift: int = 1,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    token_weight: Tensor | None = None,
    return_components: bool = False,
    backend: str | None = None,
) -> Any:
    """The ULD loss: per sequence, the mean over paired rows of ``sum_i |sort(t)_i - sort(s)_i|``.

    t and s are the rows' probabilities in descending order, the smaller vocabulary padded with zeros. The published
    code's weight 1.5 and the cross-entropy are not inside.

    Args:
        student_logits: ``[B, T_s, V_s]``, teacher_logits: ``[B, T_t, V_t]``; float16, bfloat16, float32 or float64, the
            two may differ in everything but B. Lower precisions are computed in float32.
        student_labels, teacher_labels: which rows count: integers ``[B, T]`` (-100 is ignored), a bool mask ``[B, T]``,
            ``Rows``, or None for all. Row i of answer span r on one side is paired with row i of span r on the other; a
            sequence whose two sides have different numbers of spans gives NaN.
        student_temperature, teacher_temperature: of the softmaxes. There is no factor T squared.
        ties, top_k, tail: see ``sorted_l1``.
        shift: how far integer labels lie behind the rows that predict them: 1 as a model takes them, 0 for shifted
            ones.
        student_vocab_size, teacher_vocab_size: columns from here on are padding and take no part; None: all count.
        reduction: ``"none"`` ``[B]``, ``"sum"``, or ``"mean"`` over the sequences that have a counted pair.
        num_items_in_batch: replaces the mean's denominator, which counts sequences, not tokens.
        token_weight: ``[B, T_s]``, weights of the student's positions in the mean over rows.
        return_components: also return a dict of detached scalars: ``sorted_l1``, reduced as the mean, and ``rows``, the
            number of paired rows.
        backend: run all operators on this backend or raise.

    Returns:
        The loss, float32 (float64 where either side is float64), differentiable with respect to both sides' logits; or
        ``(loss, components)``.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or value.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    _check_options(student_temperature, teacher_temperature, ties, top_k, tail, shift)
    check_reduction(reduction, num_items_in_batch)
    two_sides(student_logits, teacher_logits, token_weight)
    pairs = pair(
        Rows.of(student_labels, student_logits, shift=shift, name="student_labels"),
        Rows.of(teacher_labels, teacher_logits, shift=shift, name="teacher_labels"),
    )
    student = Logits(
        student_logits,
        pairs.student,
        student_temperature,
        vocab_size=vocabulary("student_vocab_size", student_vocab_size, student_logits),
    )
    teacher = Logits(
        teacher_logits,
        pairs.teacher,
        teacher_temperature,
        vocab_size=vocabulary("teacher_vocab_size", teacher_vocab_size, teacher_logits),
    )
    distance = sorted_l1(student, teacher, ties=ties, top_k=top_k, tail=tail, backend=backend)  # [B, A]
    weight = at_rows(token_weight, pairs.student, distance)
    if weight is None:
        weight = pairs.student.counted.to(distance.dtype)
    total = weight.sum(1)
    per_sequence = weighted(distance, weight).sum(1) / total.masked_fill(total == 0, 1)
    per_sequence = per_sequence.masked_fill(pairs.mismatched, float("nan"))
    paired = pairs.student.count > 0
    loss = reduce(per_sequence, paired, reduction, num_items_in_batch)
    if not return_components:
        return loss
    return loss, {
        "sorted_l1": reduce(per_sequence.detach(), paired, "mean", num_items_in_batch),
        "rows": pairs.student.count.sum(),
    }


def _check_options(
    student_temperature: float, teacher_temperature: float, ties: str, top_k: int | None, tail: str, shift: int
) -> None:
    checks.number("student_temperature", student_temperature, above=0)
    checks.number("teacher_temperature", teacher_temperature, above=0)
    checks.choice("ties", ties, TIES)
    checks.choice("tail", tail, TAILS)
    if top_k is not None:
        checks.integer("top_k", top_k, 1)
    checks.integer("shift", shift, 0)


class ULDLoss(LogitsLoss):
    """The ULD loss as a module; the options are those of ``uld_loss``."""

    def __init__(
        self,
        *,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        ties: str = "mean",
        top_k: int | None = None,
        tail: str = "bucket",
        shift: int = 1,
        student_vocab_size: int | None = None,
        teacher_vocab_size: int | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        _check_options(student_temperature, teacher_temperature, ties, top_k, tail, shift)
        check_reduction(reduction)
        check_backend(backend)
        super().__init__(
            uld_loss,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            ties=ties,
            top_k=top_k,
            tail=tail,
            shift=shift,
            student_vocab_size=student_vocab_size,
            teacher_vocab_size=teacher_vocab_size,
            reduction=reduction,
            backend=backend,
        )
