"""Several operators of the same logits whose gradients meet in one tensor.

Autograd adds up whole gradients: two operators that read the same logits hold two tensors of their size. An operator
here hands the logits on, as a view, to the one that comes after it, and in backward adds its own gradient, a part of
the positions at a time, to the one that comes back. The view must have one reader, and that one of our operators, whose
gradient nobody else holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mlot_kernels import backends, sides
from mlot_kernels.logits import Logits, prepare
from mlot_kernels.registry import OPERATORS, once_differentiable
from mlot_kernels.rows import Rows

PARTS = 16  # of a gradient, one of which exists beside it
PART_BYTES = 2**21  # of one on a CPU, which stays in a cache until it is added; an eighth of the gradient at most


def token_log_probability_and_logits(logits: Logits, tokens: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """``token_log_probability(logits, tokens)`` ``[B, A]``, and the values to read from here on."""
    side = prepare(logits).side
    operator = OPERATORS["token_log_probability"]
    arguments = (*side[:4], tokens, *side[4:])
    if torch.compiler.is_compiling():  # which adds up gradients as it likes, and cannot trace what comes back changed
        return operator(*arguments, backend=backend)[0], logits.values
    chosen = backends.resolve(operator.name, operator.forward, arguments, backend)
    values, log_probability, *_ = _TokenLogProbability.apply(*arguments, chosen)
    return log_probability, values


def sorted_l1_and_logits(
    student: Logits, teacher: Logits, options: tuple[Any, ...], backend: str | None
) -> tuple[Tensor, Tensor]:
    """``sorted_l1(student, teacher)`` ``[B, A]``, and the student's values to read from here on.

    Args:
        teacher: gets no gradient.
        options: as the schema has them.
    """
    s, t = sides.prepare_pair(student, teacher)
    operator = OPERATORS["sorted_l1"]
    arguments = (*s.side, *t.side, *options)
    if torch.compiler.is_compiling():
        return operator(*arguments, backend=backend)[0], student.values
    chosen = backends.resolve(operator.name, operator.forward, arguments, backend)
    values, distance, *_ = _SortedL1.apply(*arguments, chosen)
    return distance, values


class _TokenLogProbability(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        values = arguments[0]
        return values.view_as(values), *torch.ops.mlot.token_log_probability_forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values, index, column_mask, log_scale, tokens, ctx.temperature, _, ctx.vocab_size, ctx.backend = inputs
        assert log_scale is None
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # zeros for every scalar that is saved
        ctx.save_for_backward(values, index, column_mask, tokens, *output[2:])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Any, ...], gradient: Tensor | None, grad: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        if grad is None:
            return gradient, *(None,) * 8
        values, index, column_mask, tokens, *scalars = saved

        def part(own: Tensor, rows: Tensor, of: Sequence[Tensor]) -> Tensor:
            grad, tokens, *scalars = of
            return torch.ops.mlot.token_log_probability_backward(
                grad, own, rows, column_mask, tokens, *scalars, ctx.temperature, ctx.vocab_size, ctx.backend
            )[0]

        return _add_by_parts(gradient, values, index, (grad, tokens, *scalars), part), *(None,) * 8


class _SortedL1(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        values = arguments[0]
        return values.view_as(values), *torch.ops.mlot.sorted_l1_forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # zeros for every scalar that is saved
        ctx.save_for_backward(*inputs[:4], *inputs[7:11], *output[2:])
        ctx.student_options, ctx.teacher_options, ctx.options = inputs[4:7], inputs[11:14], inputs[14:]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Any, ...], gradient: Tensor | None, grad: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        values, index, column_mask, log_scale, teacher_values, teacher_index, teacher_mask, teacher_scale = saved[:8]
        if grad is None:
            return gradient, *(None,) * 17
        *options, backend = ctx.options
        by_scale = None if log_scale is None else torch.zeros_like(log_scale)

        def part(own: Tensor, rows: Tensor, of: Sequence[Tensor]) -> Tensor:
            grad, slot, teacher_rows, scale, other_scale, *scalars = of
            by_values, by_log_scale, *_ = torch.ops.mlot.sorted_l1_backward(
                grad,
                own,
                rows,
                column_mask,
                None if log_scale is None else scale,
                *ctx.student_options,
                teacher_values,
                teacher_rows.masked_fill(rows < 0, -1),
                teacher_mask,
                None if teacher_scale is None else other_scale,
                *ctx.teacher_options,
                *options,
                *scalars,
                True,
                False,
                backend,
            )
            if by_scale is not None:  # rows beyond those that count go to the first slot, as zeros
                by_scale.scatter_add_(1, slot, by_log_scale.to(by_scale.dtype).masked_fill(rows < 0, 0))
            return by_values

        slot = torch.arange(index.shape[1], device=index.device).expand_as(index)
        scales = (slot if scale is None else scale for scale in (log_scale, teacher_scale))
        of_rows = (grad, slot, teacher_index, *scales, *saved[8:])
        summed = _add_by_parts(gradient, values, index, of_rows, part)
        return summed, None, None, by_scale, *(None,) * 14


def _add_by_parts(
    gradient: Tensor | None,
    values: Tensor,
    index: Tensor,
    of_rows: Sequence[Tensor],
    backward: Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor],
) -> Tensor:
    """``gradient`` ``[B, T, V]``, None for 0, plus that of one more operator, in place.

    Args:
        index: ``[B, A]``, that operator's rows; no position stands twice.
        of_rows: each ``[B, A, ...]``.
        backward: a part's gradient, from the part of ``values``, the index ``[B, H]`` of its rows, ``of_rows`` there.
    """
    (B, A), T = index.shape, values.shape[1]
    # Without what autograd knows of it as a view.
    gradient = torch.zeros_like(values) if gradient is None else gradient.detach()
    if A == 0 or T == 0:
        return gradient
    slots = torch.arange(A, device=index.device).expand(B, A)
    slot = index.new_full((B, T + 1), -1).scatter(1, index.masked_fill(index < 0, T), slots)[:, :T]  # of each position
    may_ask = index.device.type == "cpu"  # elsewhere to ask is to wait
    height = -(-T // PARTS)
    if may_ask:
        height = max(1, min(-(-2 * T // PARTS), PART_BYTES // (B * values.shape[2] * values.element_size())))
    for start in range(0, T, height):
        part = slice(start, min(T, start + height))
        there = slot[:, part] >= 0
        if may_ask and not there.any():
            continue
        rows = Rows.from_mask(there, spans="one").index  # [B, H]
        at = slot[:, part].gather(1, rows.clamp(min=0)).clamp(min=0)
        of_part = [x[torch.arange(B, device=at.device)[:, None], at] for x in of_rows]
        gradient[:, part] += backward(values[:, part], rows, of_part)
    return gradient
