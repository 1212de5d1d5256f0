"""Universal Logit Distillation (arXiv 2402.12030): the L1 distance of sorted probabilities."""

from __future__ import annotations

from functools import partial
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
    teacher_vocabulary,
    vocabulary,
    weight_of_rows,
    weighted,
)
from mlot_kernels.losses.merged import coverage, merged_rows, rows_to_compare
from mlot_kernels.merging import MergedRows
from mlot_kernels.ops.sorted_l1 import sorted_l1
from mlot_kernels.ops.sorted_l1.reference import TAILS, TIES
from mlot_kernels.row_blocks import by_blocks
from mlot_kernels.rows import Pairing, Rows, gather_rows
from mlot_kernels.teachers import RowSource, SpreadTopK, Teacher, TeacherTopK, check_temperature


def uld_loss(
    student_logits: Tensor,
    teacher_logits: Teacher,
    student_labels: Tensor | Rows | None = None,
    teacher_labels: Tensor | Rows | None = None,
    *,
    alignment: MergedRows | None = None,
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
            two may differ in everything but B. Lower precisions are computed in float32. Instead of its logits the
            teacher may be ``TeacherHidden``, whose logits never exist whole, or ``TeacherTopK``, with or without
            columns; its tails ``"uniform"`` and ``"bucket"`` need ``teacher_vocab_size``.
        student_labels, teacher_labels: which rows count: integers ``[B, T]`` (-100 is ignored), a bool mask ``[B, T]``,
            ``Rows``, or None for all. Row i of answer span r on one side is paired with row i of span r on the other; a
            sequence whose two sides have different numbers of spans gives NaN.
        alignment: compare groups of tokens, see ``merge_groups``, instead of rows by their position; there are no
            labels beside it, the teacher comes as logits, and a merged row has the ``token_weight`` of the row that it
            is a multiple of.
        student_temperature, teacher_temperature: of the softmaxes. There is no factor T squared.
        ties, top_k, tail: see ``sorted_l1``. Against the K of a top-k with the tail ``"bucket"`` only the K largest are
            compared, and then the two sums that are left over.
        shift: how far integer labels lie behind the rows that predict them: 1 as a model takes them, 0 for shifted
            ones.
        student_vocab_size, teacher_vocab_size: columns from here on are padding and take no part; None: all count.
        reduction: ``"none"`` ``[B]``, ``"sum"``, or ``"mean"`` over the sequences that have a counted pair.
        num_items_in_batch: replaces the mean's denominator, which counts sequences, not tokens.
        token_weight: ``[B, T_s]``, weights of the student's positions in the mean over rows.
        return_components: also return a dict of detached scalars: ``sorted_l1``, reduced as the mean; ``tail_bound``,
            reduced likewise, the most that ``sorted_l1`` may be away from what it would be if the whole teacher were
            known: 0 for all forms but a top-k; ``coverage``, the mean part of a student's tokens in groups that end at
            a common byte, 1 without an alignment; ``rows``, the number of paired rows.
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
    pairs = rows_to_compare(
        student_logits, teacher_logits, student_labels, teacher_labels, shift, alignment, token_weight
    )
    V_t = teacher_vocabulary(teacher_vocab_size, teacher_logits)
    student = Logits(
        student_logits,
        pairs.student,
        student_temperature,
        vocab_size=vocabulary("student_vocab_size", student_vocab_size, student_logits),
    )
    options: dict[str, Any] = {"ties": ties, "top_k": top_k, "tail": tail, "backend": backend}
    if alignment is None:
        distance = _distances(student, teacher_logits, pairs, teacher_temperature, V_t, options)  # [B, A]
    else:
        assert isinstance(teacher_logits, Tensor)
        teacher = Logits(teacher_logits, pairs.teacher, teacher_temperature, vocab_size=V_t)
        student = merged_rows(student, alignment.student, backend)
        teacher = merged_rows(teacher, alignment.teacher, backend)
        distance = sorted_l1(student, teacher, **options)  # [B, G]
    weight = weight_of_rows(token_weight, pairs.student, distance)
    total = weight.sum(1)

    def mean_over_rows(x: Tensor) -> Tensor:  # [B, A] -> [B]
        mean = weighted(x, weight).sum(1) / total.masked_fill(total == 0, 1)
        return mean.masked_fill(pairs.mismatched, float("nan"))

    per_sequence = mean_over_rows(distance)
    paired = pairs.student.count > 0
    loss = reduce(per_sequence, paired, reduction, num_items_in_batch)
    if not return_components:
        return loss
    return loss, {
        "sorted_l1": reduce(per_sequence.detach(), paired, "mean", num_items_in_batch),
        "tail_bound": reduce(
            mean_over_rows(_tail_bound(teacher_logits, pairs, teacher_temperature, distance)),
            paired,
            "mean",
            num_items_in_batch,
        ),
        "coverage": coverage(alignment, paired),
        "rows": pairs.student.count.sum(),
    }


def _distances(
    student: Logits,
    teacher: Teacher,
    pairs: Pairing,
    temperature: float,
    vocab_size: int | None,
    options: dict[str, Any],
) -> Tensor:
    """``sorted_l1`` of the paired rows, whatever the teacher comes as, ``[B, A]``."""
    if isinstance(teacher, Tensor):
        return sorted_l1(student, Logits(teacher, pairs.teacher, temperature, vocab_size=vocab_size), **options)
    if isinstance(teacher, TeacherTopK):
        check_temperature(teacher, temperature)
        if teacher.tail == "renormalize":  # which a softmax over the K does, and columns that are not there are 0
            return sorted_l1(student, Logits(teacher.log_probabilities, pairs.teacher, temperature), **options)
        if vocab_size is None:
            raise ValueError(
                f"a TeacherTopK with tail={teacher.tail!r} needs teacher_vocab_size, among whose columns the tail "
                "is spread; pass it, or take tail='renormalize'"
            )
        if teacher.tail == "bucket":
            options = _with_bucket(options, teacher.log_probabilities.shape[2])
        source: RowSource = SpreadTopK(teacher, vocab_size)
    else:
        source = teacher
    return by_blocks(partial(sorted_l1, **options), student, source, pairs, temperature, vocab_size)


def _with_bucket(options: dict[str, Any], K: int) -> dict[str, Any]:
    """What compares the K largest, and then the sums of the rest: however the tail is spread, it stays behind them."""
    if options["top_k"] is None:
        return {**options, "top_k": K, "tail": "bucket"}
    checks.integer("top_k", options["top_k"], 1, K, "the K of a TeacherTopK with tail='bucket'")
    return options


def _tail_bound(teacher: Teacher, pairs: Pairing, temperature: float, like: Tensor) -> Tensor:
    """How far a row's distance may be from the whole teacher's, ``[B, A]``; ops/sorted_l1/README.md says why."""
    if not isinstance(teacher, TeacherTopK):
        return torch.zeros_like(like)
    if temperature > 1:  # which makes more of the tail, nobody knows how much
        return torch.full_like(like, 2.0)
    bound = 2 * teacher.log_tail().exp().squeeze(-1)  # [B, T]
    return gather_rows(bound[..., None], pairs.teacher.index).squeeze(-1).to(like.dtype)


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


class ULDLoss(AlignedLoss):
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
