"""What operators share that compare a student's rows with a teacher's, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.checks import accumulator
from mlot_kernels.logits import Logits, Prepared, prepare

SCHEMA = ", ".join(
    f"Tensor {side}_values, Tensor {side}_index, Tensor? {side}_column_mask, Tensor? {side}_log_scale, "
    f"float {side}_temperature, bool {side}_standardize, SymInt {side}_vocab_size"
    for side in ("student", "teacher")
)
FIELDS = 7  # of a side in it

GRADIENTS_SCHEMA = (
    "(Tensor grad_student_values, Tensor grad_student_log_scale, Tensor grad_teacher_values, "
    "Tensor grad_teacher_log_scale)"
)


def prepare_pair(student: Tensor | Logits, teacher: Tensor | Logits) -> tuple[Prepared, Prepared]:
    """Check two sides whose rows meet one by one.

    Raises:
        TypeError, ValueError: a field has another type, dtype, shape, device or range, or the rows do not match.
    """
    s, t = prepare(student, "student"), prepare(teacher, "teacher")
    if s.side.row_index.shape != t.side.row_index.shape:
        raise ValueError(
            "student and teacher must have rows of the same shape [B, A], got "
            f"{tuple(s.side.row_index.shape)} and {tuple(t.side.row_index.shape)}; match them with mlot_kernels.pair"
        )
    checks.same_device(student=s.side.values, teacher=t.side.values)
    return s, t


def fake_gradients(sides: Sequence[Any], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """Those of ``GRADIENTS_SCHEMA``, from the arguments of ``SCHEMA``; empty for a side that needs none."""
    outputs = []
    for i, need in enumerate(needed):
        values, index = sides[FIELDS * i : FIELDS * i + 2]
        outputs += [
            values.new_empty(values.shape if need else (0,)),
            values.new_empty(index.shape if need else (0,), dtype=accumulator(values.dtype)),
        ]
    return tuple(outputs)


def gradients_of_inputs(
    gradients: Sequence[Tensor], needed: Sequence[bool], log_scales: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """For each argument of ``SCHEMA`` its gradient, from those of ``GRADIENTS_SCHEMA``."""
    by_argument: list[Tensor | None] = []
    for i, log_scale in enumerate(log_scales):
        values, scale = gradients[2 * i : 2 * i + 2]
        of_scale = scale.to(log_scale.dtype) if needed[i] and log_scale is not None else None
        by_argument += [values if needed[i] else None, None, None, of_scale, None, None, None]
    return tuple(by_argument)


def where_both_count(loss: Tensor, student_index: Tensor, teacher_index: Tensor) -> Tensor:
    """0 where neither row counts, NaN where only one does: such rows are no pair."""
    student, teacher = student_index >= 0, teacher_index >= 0
    return loss.masked_fill(student != teacher, float("nan")).masked_fill(~student & ~teacher, 0)
