"""The hybrid loss of GOLD: tokens that both vocabularies have are compared as such, the others by their order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.logits import Logits
from mlot_kernels.losses.common import (
    AlignedLoss,
    check_backend,
    check_reduction,
    reduce,
    vocabulary,
    weight_of_rows,
    weighted,
)
from mlot_kernels.losses.merged import coverage, merged_rows, rows_to_compare
from mlot_kernels.merging import MergedRows
from mlot_kernels.one_gradient import sorted_l1_and_logits
from mlot_kernels.ops.row_divergence import row_divergence
from mlot_kernels.ops.sorted_l1 import sorted_l1
from mlot_kernels.rows import Pairing, Rows

LEAST_PROBABILITY = 1e-8  # that TRL's divergence knows


def hybrid_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_labels: Tensor | Rows | None = None,
    teacher_labels: Tensor | Rows | None = None,
    *,
    column_pairs: Tensor,
    alignment: MergedRows | None = None,
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
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
    """The hybrid ULD loss of TRL's GOLD (``trl.experimental.gold`` 1.16): per sequence the mean over pairs of rows of

    ::

        matched_weight * JSD_beta over column_pairs + unmatched_weight * sum_i |sort(t)_i - sort(s)_i| over the others

    t and s are the rows' probabilities, which are not normalised again for either part. The divergence is
    ``row_divergence``'s jsd, with probabilities below 1e-8 counted as that. TRL's weights of the whole and of the
    cross-entropy are not inside.

    Args:
        student_logits: ``[B, T_s, V_s]``, teacher_logits: ``[B, T_t, V_t]``; float16, bfloat16, float32 or float64, the
            two may differ in everything but B. Lower precisions are computed in float32.
        student_labels, teacher_labels: which rows count: integers ``[B, T]`` (-100 is ignored), a bool mask ``[B, T]``,
            ``Rows``, or None for all. Row i of answer span r on one side is paired with row i of span r on the other; a
            sequence whose two sides have different numbers of spans gives NaN.
        column_pairs: int64 ``[P, 2]``, a student's column and the teacher's of the same token, see ``shared_tokens``;
            a column stands in one pair at most.
        alignment: compare groups of tokens, see ``merge_groups``, instead of rows by their position; there are no
            labels beside it, and a merged row has the ``token_weight`` of the row that it is a multiple of.
        beta: of the divergence, 0 to 1: KL(t | s) for 0, KL(s | t) for 1.
        matched_weight, unmatched_weight: of the two parts, both or none. None: P / V_t, and what is left of 1.
        student_temperature, teacher_temperature: of the softmaxes. There is no factor T squared.
        shift: how far integer labels lie behind the rows that predict them: 1 as a model takes them, 0 for shifted
            ones.
        student_vocab_size, teacher_vocab_size: columns from here on are padding and take no part; None: all count.
        reduction: ``"none"`` ``[B]``, ``"sum"``, or ``"mean"`` over the sequences that have a counted pair. TRL's mean
            is over all: pass ``num_items_in_batch=B``.
        num_items_in_batch: replaces the mean's denominator, which counts sequences, not tokens.
        token_weight: ``[B, T_s]``, weights of the student's positions in the mean over rows.
        return_components: also return a dict of detached scalars: ``matched`` and ``unmatched``, the two parts before
            their weights, reduced as the mean; ``coverage``, the mean part of a student's tokens in groups that end at
            a common byte, 1 without an alignment; ``rows``, the number of paired rows.
        backend: run all operators on this backend or raise.

    Returns:
        The loss, float32 (float64 where either side is float64), differentiable with respect to both sides' logits; or
        ``(loss, components)``. Where either side has no unmatched column that part is 0, as in TRL.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or value.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    _check_options(
        column_pairs, beta, matched_weight, unmatched_weight, student_temperature, teacher_temperature, shift
    )
    check_reduction(reduction, num_items_in_batch)
    pairs = rows_to_compare(
        student_logits,
        teacher_logits,
        student_labels,
        teacher_labels,
        shift,
        alignment,
        token_weight,
        dense_because="HybridLoss reads the teacher's rows in two ways",
    )
    checks.same_device(student_logits=student_logits, column_pairs=column_pairs)
    V_s = vocabulary("student_vocab_size", student_vocab_size, student_logits)
    V_t = vocabulary("teacher_vocab_size", teacher_vocab_size, teacher_logits)
    student = Logits(student_logits, pairs.student, student_temperature, vocab_size=V_s)
    teacher = Logits(teacher_logits, pairs.teacher, teacher_temperature, vocab_size=V_t)
    if alignment is not None:
        student = merged_rows(student, alignment.student, backend)
        teacher = merged_rows(teacher, alignment.teacher, backend)
    unmatched, student = _unmatched(student, teacher, pairs, column_pairs, backend)  # [B, A]
    matched = row_divergence(
        student,
        teacher,
        kind="jsd",
        beta=beta,
        column_pairs=column_pairs,
        floor=LEAST_PROBABILITY,
        backend=backend,
    )
    if matched_weight is None or unmatched_weight is None:
        matched_weight = len(column_pairs) / V_t
        unmatched_weight = 1 - matched_weight

    weight = weight_of_rows(token_weight, pairs.student, matched)
    parts = [_mean_over_rows(each, weight, pairs) for each in (matched, unmatched)]
    per_sequence = matched_weight * parts[0] + unmatched_weight * parts[1]
    paired = pairs.student.count > 0
    loss = reduce(per_sequence, paired, reduction, num_items_in_batch)
    if not return_components:
        return loss
    return loss, {
        "matched": reduce(parts[0].detach(), paired, "mean", num_items_in_batch),
        "unmatched": reduce(parts[1].detach(), paired, "mean", num_items_in_batch),
        "coverage": coverage(alignment, paired),
        "rows": pairs.student.count.sum(),
    }


def _unmatched(
    student: Logits, teacher: Logits, pairs: Pairing, column_pairs: Tensor, backend: str | None
) -> tuple[Tensor, Logits]:
    """``sorted_l1`` over the columns in no pair ``[B, A]``, and the student to read from here on."""
    widths = [vocabulary("vocab_size", side.vocab_size, side.values) for side in (student, teacher)]
    if len(column_pairs) >= min(widths):
        dtype = checks.accumulator(student.values.dtype)
        return student.values.new_zeros(pairs.student.index.shape, dtype=dtype), student
    own, other = (
        replace(side, columns=_others(side.values.shape[2], column_pairs[:, i]))
        for i, side in enumerate((student, teacher))
    )
    if teacher.values.requires_grad:
        return sorted_l1(own, other, backend=backend), student
    distance, values = sorted_l1_and_logits(own, other, ("mean", max(widths), "bucket"), backend)
    return distance, replace(student, values=values)


def _others(width: int, columns: Tensor) -> Tensor:
    """``[width]`` bool, True but at ``columns``; ones that do not exist show in the divergence."""
    others = torch.ones(width, dtype=torch.bool, device=columns.device)
    return others.scatter(0, columns.clamp(0, width - 1), False)


def _mean_over_rows(values: Tensor, weight: Tensor, pairs: Pairing) -> Tensor:
    """``[B, A]`` to ``[B]``; NaN for a mismatched sequence."""
    total = weight.sum(1)
    mean = weighted(values, weight).sum(1) / total.masked_fill(total == 0, 1)
    return mean.masked_fill(pairs.mismatched, float("nan"))


def _check_options(
    column_pairs: Tensor,
    beta: float,
    matched_weight: float | None,
    unmatched_weight: float | None,
    student_temperature: float,
    teacher_temperature: float,
    shift: int,
) -> None:
    checks.tensor("column_pairs", column_pairs, "[P, 2]", (torch.int64,))
    checks.sized("column_pairs", column_pairs, (column_pairs.shape[0], 2), "[P, 2]")
    checks.number("beta", beta, least=0, most=1)
    if (matched_weight is None) != (unmatched_weight is None):
        raise ValueError(
            "matched_weight and unmatched_weight must be given together or not at all, got "
            f"{matched_weight} and {unmatched_weight}"
        )
    for name, weight in (("matched_weight", matched_weight), ("unmatched_weight", unmatched_weight)):
        if weight is not None:
            checks.number(name, weight)
    checks.number("student_temperature", student_temperature, above=0)
    checks.number("teacher_temperature", teacher_temperature, above=0)
    checks.integer("shift", shift, 0)


class HybridLoss(AlignedLoss):
    """The hybrid loss as a module; the options are those of ``hybrid_loss``."""

    def __init__(
        self,
        column_pairs: Tensor,
        *,
        beta: float = 0.5,
        matched_weight: float | None = None,
        unmatched_weight: float | None = None,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        shift: int = 1,
        student_vocab_size: int | None = None,
        teacher_vocab_size: int | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        _check_options(
            column_pairs, beta, matched_weight, unmatched_weight, student_temperature, teacher_temperature, shift
        )
        check_reduction(reduction)
        check_backend(backend)
        super().__init__(
            hybrid_loss,
            column_pairs=column_pairs,
            beta=beta,
            matched_weight=matched_weight,
            unmatched_weight=unmatched_weight,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            shift=shift,
            student_vocab_size=student_vocab_size,
            teacher_vocab_size=teacher_vocab_size,
            reduction=reduction,
            backend=backend,
        )
