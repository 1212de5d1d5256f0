"""Rows of logits that stand for groups of tokens: what the losses do with ``alignment``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.logits import Logits
from mlot_kernels.losses.common import paired_rows, reduce, two_sides
from mlot_kernels.merging import Factors, MergedRows
from mlot_kernels.one_gradient import token_log_probability_and_logits
from mlot_kernels.registry import once_differentiable
from mlot_kernels.rows import Pairing, Rows
from mlot_kernels.teachers import Teacher

LEAST_FACTOR = 1e-8  # that TRL's merging lets a token's probability have

NEEDS_LOGITS = "merged rows multiply by probabilities of other rows' tokens"


def rows_to_compare(
    student_logits: Tensor,
    teacher: Teacher,
    student_labels: Any,
    teacher_labels: Any,
    shift: int,
    alignment: Any,
    token_weight: Any,
    dense_because: str = "",
) -> Pairing:
    """Check a loss's inputs; the rows that it compares one by one, from labels or from an alignment.

    Args:
        dense_because: as of ``two_sides``, where there is no alignment.
    """
    if alignment is None:
        two_sides(student_logits, teacher, token_weight, dense_because=dense_because)
        return paired_rows(student_logits, teacher, student_labels, teacher_labels, shift)
    two_sides(student_logits, teacher, token_weight, dense_because=NEEDS_LOGITS)
    assert isinstance(teacher, Tensor)
    _check_alignment(alignment, student_logits, teacher, (student_labels, teacher_labels), shift)
    pairs: Pairing = alignment.pairs
    return pairs


def _check_alignment(alignment: Any, student_logits: Tensor, teacher_logits: Tensor, labels: Any, shift: int) -> None:
    if not isinstance(alignment, MergedRows):
        raise TypeError(f"alignment must be MergedRows of merge_groups, got {type(alignment).__name__}")
    if any(side is not None for side in labels):
        raise ValueError(
            "student_labels and teacher_labels must be None beside an alignment, which says which tokens count; "
            "pass masks of them to align_byte_offsets"
        )
    if shift != 1:
        raise ValueError(f"shift says how labels lie, got {shift} beside an alignment, whose strategy says it")
    for name, rows, logits in (
        ("student", alignment.pairs.student, student_logits),
        ("teacher", alignment.pairs.teacher, teacher_logits),
    ):
        checks.sized(f"the {name}'s rows of alignment", rows.count, logits.shape[:1], f"[B] as {name}_logits")
        rows.check_length(logits.shape[1], f"the {name}'s rows of alignment", f"{name}_logits")
    checks.same_device(student_logits=student_logits, alignment=alignment.pairs.student.index)


def merged_rows(rows: Logits, factors: Factors | None, backend: str | None) -> Logits:
    """``rows`` of one side, times the factors' probabilities: with a log scale, and values whose gradients meet.

    The values must have one reader from here on, see ``one_gradient``.
    """
    if factors is None:
        return rows
    assert isinstance(rows.rows, Rows)
    others = replace(rows, rows=factors.rows)
    log_p, values = token_log_probability_and_logits(others, factors.tokens, backend)  # [B, F]
    least = math.log(LEAST_FACTOR)
    log_p = torch.where(log_p < least, least, log_p)  # which lets NaN through
    log_scale = _SumOfGroups.apply(log_p, factors.group, rows.rows.index.shape[1])
    return replace(rows, values=values, log_scale=log_scale)


class _SumOfGroups(torch.autograd.Function):
    """``x`` ``[B, F]`` added up over each of G groups, ``[B, G]``; ``group`` ascends, and is G for what is in none.

    By doubling, and not by atomics or differences of one running sum: every run has the same result, and a NaN stays in
    its group.
    """

    @staticmethod
    def forward(x: Tensor, group: Tensor, G: int) -> Tensor:
        F = x.shape[1]
        if F == 0 or G == 0:
            return x.new_zeros(len(x), G)
        summed, reach = x, 1
        while reach < F:  # summed: from the first of the group, or of the last `reach`, on
            same = group[:, reach:] == group[:, :-reach]
            behind = torch.where(same, summed[:, :-reach], 0)
            summed = torch.cat((summed[:, :reach], summed[:, reach:] + behind), 1)
            reach *= 2
        last = torch.ones_like(group, dtype=torch.bool)
        last[:, :-1] = group[:, 1:] != group[:, :-1]
        to = group.masked_fill(~last, G)  # what ends no group goes to a column that is cut
        return x.new_zeros(len(x), G + 1).scatter(1, to, summed)[:, :G]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.groups = inputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        (group,) = saved
        if ctx.groups == 0:
            return grad.new_zeros(group.shape), None, None
        nowhere = grad.new_zeros(len(grad), 1)
        return torch.cat((grad, nowhere), 1).gather(1, group.clamp(max=ctx.groups)), None, None


def coverage(alignment: MergedRows | None, paired: Tensor) -> Tensor:
    """The component: the mean of ``Alignment.coverage`` over the sequences that have a pair; 1 without an alignment."""
    values = paired.float() if alignment is None else alignment.coverage.masked_fill(~paired, 0)
    return reduce(values, paired, "mean")
