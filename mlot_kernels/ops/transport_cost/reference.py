"""The definition: the operators ``pairwise_cost`` and ``sinkhorn``, one after the other.

Their maths stands in their own folders; this page calls them as torch ops. What a fused backend spares is the cost
matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlot_kernels.transport import TransportOptions, within


def transport_cost(x: Tensor, y: Tensor, metric: str, options: TransportOptions) -> tuple[Tensor, Tensor]:
    """Differentiable by autograd: transport cost and regularised cost, ``[B]`` each."""
    x, y = counted(x, y, options)
    cost = torch.ops.mlot.pairwise_cost(x, y, metric, "reference")
    transported, regularized, *_ = torch.ops.mlot.sinkhorn(cost, *options, False, "reference")
    return transported, regularized


def counted(x: Tensor, y: Tensor, options: TransportOptions) -> tuple[Tensor, Tensor]:
    """Both sides with zeros beyond their lengths and where a marginal is 0, whatever lies there."""
    sides = []
    for side, lengths, marginal in (
        (x, options.row_lengths, options.row_marginal),
        (y, options.column_lengths, options.column_marginal),
    ):
        counts = within(lengths, side.shape[0], side.shape[1], side.device)
        if marginal is not None:
            counts = counts & (marginal != 0)
        sides.append(side.masked_fill(~counts[..., None], 0))
    return sides[0], sides[1]


def forward(x: Tensor, y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """``arguments``: the options' tensors, the metric, the other options, as in the schema."""
    metric, options = _split(arguments)
    cost = torch.ops.mlot.pairwise_cost_forward(*counted(x, y, options), metric, "reference")
    transported, regularized, _, *rest = torch.ops.mlot.sinkhorn_forward(cost, *options, False, "reference")
    return transported, regularized, *rest


def backward(grad_transported: Tensor, grad_regularized: Tensor, x: Tensor, y: Tensor, *arguments: Any) -> tuple:
    """The two operators' backwards in reverse, on the cost made once more; a side that is not needed is empty."""
    (metric, options), saved, needed = _split(arguments[:12]), arguments[12:17], arguments[17:]
    sides = counted(x, y, options)
    cost = torch.ops.mlot.pairwise_cost_forward(*sides, metric, "reference")
    grad_cost, *rest = torch.ops.mlot.sinkhorn_backward(
        grad_transported,
        grad_regularized,
        cost.new_empty(0),
        cost,
        *options[:5],
        *saved,
        *options[5:],
        False,
        "reference",
    )
    grads = torch.ops.mlot.pairwise_cost_backward(grad_cost, *sides, metric, *needed, "reference")
    return *grads, *rest


def _split(arguments: tuple[Any, ...]) -> tuple[str, TransportOptions]:
    return arguments[5], TransportOptions(*arguments[:5], *arguments[6:12])
