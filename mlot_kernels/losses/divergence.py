"""Divergences of the student's rows from the teacher's, where both have one vocabulary or share a part of theirs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.logits import Logits
from mlot_kernels.losses.common import (
    LogitsLoss,
    check_backend,
    check_reduction,
    paired_rows,
    reduce,
    teacher_vocabulary,
    two_sides,
    vocabulary,
    weight_of_rows,
    weighted,
)
from mlot_kernels.ops.rank_truncate import gather_columns
from mlot_kernels.ops.row_divergence import row_divergence
from mlot_kernels.ops.row_divergence.reference import KINDS
from mlot_kernels.row_blocks import by_blocks
from mlot_kernels.rows import Pairing, Rows
from mlot_kernels.teachers import (
    SpreadTopK,
    Teacher,
    TeacherTopK,
    check_temperature,
    log_rest,
    need_columns,
)


def divergence_loss(
    student_logits: Tensor,
    teacher_logits: Teacher,
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
    pairs = paired_rows(student_logits, teacher_logits, student_labels, teacher_labels, shift)
    V_s = vocabulary("student_vocab_size", student_vocab_size, student_logits)
    V_t = teacher_vocabulary(teacher_vocab_size, teacher_logits) or V_s
    student = Logits(student_logits, pairs.student, student_temperature, vocab_size=V_s)
    options = {
        "kind": kind,
        "beta": beta,
        "skew": skew,
        "head": head,
        "interpolation": interpolation,
        "column_pairs": column_pairs,
        "backend": backend,
    }
    each = divergences(student, teacher_logits, pairs, teacher_temperature, V_t, options)  # [B, A]
    weight = weight_of_rows(token_weight, pairs.student, each)
    each = weighted(each, weight).masked_fill(pairs.mismatched[:, None], float("nan"))
    loss = reduce(each, weight, reduction, num_items_in_batch)
    if not return_components:
        return loss
    return loss, {
        "divergence": reduce(each.detach(), weight, "mean", num_items_in_batch),
        "rows": pairs.student.count.sum(),
    }


def divergences(
    student: Logits,
    teacher: Teacher,
    pairs: Pairing,
    temperature: float,
    vocab_size: int,
    options: dict[str, Any],
) -> Tensor:
    """``row_divergence`` of the paired rows, whatever the teacher comes as, ``[B, A]``."""
    if isinstance(teacher, Tensor):
        return row_divergence(student, Logits(teacher, pairs.teacher, temperature, vocab_size=vocab_size), **options)
    if isinstance(teacher, TeacherTopK):
        need_columns(teacher, "DivergenceLoss")
        check_temperature(teacher, temperature)
        if teacher.tail != "uniform":
            return _of_outcomes(student, teacher, pairs, temperature, vocab_size, options)
    source = SpreadTopK(teacher, vocab_size) if isinstance(teacher, TeacherTopK) else teacher
    return by_blocks(partial(row_divergence, **options), student, source, pairs, temperature, vocab_size)


def _of_outcomes(
    student: Logits,
    teacher: TeacherTopK,
    pairs: Pairing,
    temperature: float,
    vocab_size: int,
    options: dict[str, Any],
) -> Tensor:
    """The divergence of K + 1 outcomes: the teacher's columns, and all others together.

    Where the teacher's part of the others is 0 this is the divergence over all columns: each term is then a multiple of
    the student's probability, and so is their sum.
    """
    _check_outcomes(teacher.tail, student.vocab_size, vocab_size, options)
    log_p, columns = teacher.at(pairs.teacher.index, vocab_size)  # [B, A, K]
    unknown = log_p == float("-inf")
    backend = options["backend"]
    log_q = gather_columns(student, columns.masked_fill(unknown, 0), backend=backend).log_probabilities[0]
    log_q = log_q.masked_fill(unknown, float("-inf"))
    rest = log_rest(log_p) if teacher.tail == "bucket" else torch.full_like(log_p[..., :1], float("-inf"))
    rows = Rows.from_mask(pairs.student.counted, spans="one")  # of [B, A, K + 1]
    q = Logits(torch.cat((log_q, log_rest(log_q)), -1), rows)
    p = Logits(torch.cat((log_p, rest), -1), rows, temperature)
    return row_divergence(q, p, **options)


def _check_outcomes(tail: str, student_size: int | None, teacher_size: int | None, options: dict[str, Any]) -> None:
    where = f"a TeacherTopK with tail={tail!r}"
    kind, beta, skew = options["kind"], options["beta"], options["skew"]
    if student_size != teacher_size:
        raise ValueError(
            f"student and teacher must have vocabularies of one size, got {student_size} and {teacher_size}"
        )
    if options["column_pairs"] is not None:
        raise ValueError(
            f"column_pairs cannot be used with {where}, which compares the teacher's columns and the rest as a whole; "
            "take tail='uniform', or write the student's numbers into its columns and leave column_pairs out"
        )
    if tail == "bucket" and options["interpolation"] < 1:
        raise ValueError(
            f"interpolation below 1 mixes logits, which {where} does not know of its tail; "
            "take 'renormalize' or 'uniform'"
        )
    infinite = (
        kind in ("reverse_kl", "adaptive_kl") or (kind, beta) == ("jsd", 1) or (kind, skew) == ("skew_reverse_kl", 0)
    )
    if tail == "renormalize" and infinite:
        raise ValueError(
            f"{kind} is infinite where the teacher's probability is 0, which {where} makes of all columns but the K; "
            "take tail='bucket' or 'uniform'"
        )


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
