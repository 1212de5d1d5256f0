"""Single entries of rows of logits, and a gradient that is written there alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlot_kernels.checks import accumulator
from mlot_kernels.registry import once_differentiable


def entries(values: Tensor, index: Tensor, columns: Tensor) -> Tensor:
    """``values`` ``[B, T, V]`` at the rows ``index`` ``[B, A]``, -1 for none, and each one's ``columns`` ``[B, A, m]``.

    ``[B, A, m]`` in the accumulator's dtype; 0 where there is no row. A column may stand twice in a row, no
    row stands twice. Differentiable once.
    """
    return entries_and_values(values, index, columns)[0]


def entries_and_values(values: Tensor, index: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """``entries``, and the values to read from here on: their gradients meet in one tensor, see ``one_gradient``."""
    T = values.shape[1]
    if T == 0:
        return values.new_zeros(columns.shape, dtype=accumulator(values.dtype)), values
    anywhere = torch.arange(index.shape[1], device=index.device).clamp(
        max=T - 1
    )  # apart, for backward adds zeros there
    rest, there = _Entries.apply(values, torch.where(index < 0, anywhere, index), columns)
    if torch.compiler.is_compiling():  # which adds up gradients as it likes
        rest = values
    return there.masked_fill(index[..., None] < 0, 0), rest


class _Entries(torch.autograd.Function):
    """Backward is the same on every run: a sum of two, and any zeros, has one value in whatever order it is made."""

    @staticmethod
    def forward(values: Tensor, position: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        sequence = torch.arange(len(values), device=values.device)[:, None, None]
        there = values[sequence, position[..., None], columns].to(accumulator(values.dtype))
        return values.view_as(values), there

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        values, position, columns = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(position, columns)
        ctx.shape, ctx.dtype = values.shape, values.dtype

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Any, ...], gradient: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad is None:
            return gradient, None, None
        position, columns = saved
        B, T, V = ctx.shape
        first = (torch.arange(B, device=grad.device)[:, None] * T + position) * V  # [B, A]
        if gradient is None or not gradient.is_contiguous():
            summed = grad.new_zeros(B * T * V, dtype=ctx.dtype)
        else:
            summed = gradient.detach().view(-1)
        # Not scatter_add_, which on a CPU makes a float32 copy of all of a 16-bit gradient.
        summed.index_add_(0, (first[..., None] + columns).flatten(), grad.to(ctx.dtype).flatten())
        summed = summed.view(B, T, V)
        if gradient is not None and not gradient.is_contiguous():
            summed += gradient
        return summed, None, None
