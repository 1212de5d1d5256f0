"""What the losses share: their inputs' checks and their reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mlot_kernels import checks
from mlot_kernels.backends import BACKENDS
from mlot_kernels.merging import MergedRows
from mlot_kernels.rows import Pairing, Rows, pair
from mlot_kernels.teachers import Teacher, TeacherHidden, TeacherTopK, by_position

REDUCTIONS = ("mean", "sum", "none")


class Loss(nn.Module):
    """A loss function with its options, as a module; options that are tensors move with it (``.to(device)``)."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.function = function
        self._options = options
        for name, value in options.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)

    @property
    def options(self) -> dict[str, Any]:
        """What the function is called with."""
        return self._options | dict(self.named_buffers(recurse=False))

    def extra_repr(self) -> str:
        shown = ((name, tuple(x.shape) if isinstance(x, Tensor) else repr(x)) for name, x in self.options.items())
        return ", ".join(f"{name}={value}" for name, value in shown)


class LogitsLoss(Loss):
    """A loss of two sides' logits."""

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Teacher,
        student_labels: Tensor | Rows | None = None,
        teacher_labels: Tensor | Rows | None = None,
        *,
        num_items_in_batch: Tensor | float | None = None,
        token_weight: Tensor | None = None,
        return_components: bool = False,
    ) -> Any:
        """The loss, or ``(loss, components)``; arguments as the loss function has them."""
        return self.function(
            student_logits,
            teacher_logits,
            student_labels,
            teacher_labels,
            **self.options,
            num_items_in_batch=num_items_in_batch,
            token_weight=token_weight,
            return_components=return_components,
        )


class AlignedLoss(LogitsLoss):
    """A loss of two sides' logits that may compare groups of tokens."""

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Teacher,
        student_labels: Tensor | Rows | None = None,
        teacher_labels: Tensor | Rows | None = None,
        *,
        alignment: MergedRows | None = None,
        num_items_in_batch: Tensor | float | None = None,
        token_weight: Tensor | None = None,
        return_components: bool = False,
    ) -> Any:
        """The loss, or ``(loss, components)``; arguments as the loss function has them."""
        return self.function(
            student_logits,
            teacher_logits,
            student_labels,
            teacher_labels,
            **self.options,
            alignment=alignment,
            num_items_in_batch=num_items_in_batch,
            token_weight=token_weight,
            return_components=return_components,
        )


def two_sides(student_logits: Any, teacher: Any, token_weight: Any = None, *, dense_because: str = "") -> None:
    """Check the student's logits ``[B, T, V]``, the teacher, and the weight ``[B, T_student]`` of the student's tokens.

    Args:
        dense_because: why a loss takes no other form of a teacher than its logits; empty where it does.
    """
    checks.tensor("student_logits", student_logits, "[B, T, V]")
    if not isinstance(teacher, (TeacherHidden, TeacherTopK)):
        checks.tensor("teacher_logits", teacher, "[B, T, V]")
    elif dense_because:
        raise TypeError(f"teacher_logits must be a tensor, got {type(teacher).__name__}: {dense_because}; pass logits")
    positions = by_position(teacher)
    if student_logits.shape[0] != positions.shape[0]:
        raise ValueError(
            "student_logits and teacher_logits must have the same batch size, got "
            f"{tuple(student_logits.shape)} and {tuple(positions.shape)}"
        )
    if token_weight is not None:
        checks.tensor("token_weight", token_weight, "[B, T]")
        checks.sized("token_weight", token_weight, student_logits.shape[:2], "[B, T] as student_logits")
    checks.same_device(student_logits=student_logits, teacher_logits=positions, token_weight=token_weight)


def vocabulary(name: str, size: int | None, logits: Tensor) -> int:
    """The size of a side's vocabulary: ``size``, or the width of its logits."""
    width = logits.shape[2]
    return width if size is None else checks.integer(name, size, 1, width, "the width of its logits")


def teacher_vocabulary(size: int | None, teacher: Teacher) -> int | None:
    """The same of the teacher's: ``size``, or the width of its logits, or None for a top-k, which has none."""
    if isinstance(teacher, Tensor):
        return vocabulary("teacher_vocab_size", size, teacher)
    if isinstance(teacher, TeacherHidden):
        most = teacher.width
        return most if size is None else checks.integer("teacher_vocab_size", size, 1, most, "the rows of its head")
    K = teacher.log_probabilities.shape[2]
    return None if size is None else int(checks.integer("teacher_vocab_size", size, K))


def at_rows(weight: Tensor | None, rows: Rows, like: Tensor) -> Tensor | None:
    """``weight [B, T]`` at the counted rows: ``[B, A]`` in the dtype of ``like``, 0 beyond them."""
    if weight is None:
        return None
    if weight.shape[1] == 0:
        return like.new_zeros(rows.index.shape)
    return weight.gather(1, rows.index.clamp(min=0)).to(like.dtype).masked_fill(~rows.counted, 0)


def paired_rows(
    student_logits: Tensor, teacher: Teacher, student_labels: Any, teacher_labels: Any, shift: int
) -> Pairing:
    """The rows that a loss compares one by one, from what it accepts as labels."""
    return pair(
        Rows.of(student_labels, student_logits, shift=shift, name="student_labels"),
        Rows.of(teacher_labels, by_position(teacher), shift=shift, name="teacher_labels"),
    )


def weight_of_rows(token_weight: Tensor | None, rows: Rows, like: Tensor) -> Tensor:
    """What each of the rows weighs in a mean: its token's weight, else 1; 0 beyond them. ``[B, A]``"""
    weight = at_rows(token_weight, rows, like)
    return rows.counted.to(like.dtype) if weight is None else weight


def weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    """``values * weight``; a weight of 0 takes an infinite value out."""
    return values if weight is None else torch.where(weight == 0, 0, values) * weight


def check_backend(backend: str | None) -> None:
    if backend is not None:
        checks.choice("backend", backend, BACKENDS)


def check_reduction(reduction: str, num_items_in_batch: Any = None) -> None:
    checks.choice("reduction", reduction, REDUCTIONS)
    if num_items_in_batch is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"num_items_in_batch replaces the denominator of reduction='mean', got {reduction!r}; leave one of them out"
        )
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(f"num_items_in_batch must hold one number, got shape {tuple(num_items_in_batch.shape)}")
    else:
        checks.number("num_items_in_batch", num_items_in_batch, above=0)


def reduce(values: Tensor, weight: Tensor, reduction: str, num_items_in_batch: Tensor | float | None = None) -> Tensor:
    """Reduce a loss.

    Args:
        values: what is summed, 0 where nothing counts.
        weight: of the same shape, what the mean's denominator sums; where that sum is 0 the mean is 0.
        num_items_in_batch: replaces that denominator (gradient accumulation over several batches).
    """
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if num_items_in_batch is None:
        total = weight.sum()
        return values.sum() / total.masked_fill(total == 0, 1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(values).reshape(())
    return values.sum() / num_items_in_batch
