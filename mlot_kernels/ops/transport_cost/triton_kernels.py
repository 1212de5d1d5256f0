"""transport_cost on a GPU: the kernels of ``pairwise_cost`` and ``sinkhorn``, a few problems at a time.

Their costs, and in backward dl/dC, pass through scratch that the cache next to the memory can hold. Made in registers
where they are used, costs would be made again for every base, each time from D features: more than reading them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlot_kernels.ops.transport_cost.reference import counted
from mlot_kernels.transport import TransportOptions

SCRATCH = 2**20  # costs that stand in scratch at a time; those of one problem may be more


def forward(x: Tensor, y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """``arguments``: the options' tensors, the metric, the other options, as in the schema."""
    metric, options = _split(arguments)

    def run(part: slice) -> tuple[Tensor, ...]:
        own = _of(options, part)
        cost = torch.ops.mlot.pairwise_cost_forward(*_sides(x[part], y[part], own), metric, "triton")
        transported, regularized, _, *rest = torch.ops.mlot.sinkhorn_forward(cost, *own, False, "triton")
        return transported, regularized, *rest

    return _in_parts(x, y, run)


def backward(
    grad_transported: Tensor, grad_regularized: Tensor, x: Tensor, y: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The two operators' backwards in reverse, on the cost made once more; a side that is not needed is empty."""
    (metric, options), saved, needed = _split(arguments[:12]), arguments[12:17], arguments[17:]

    def run(part: slice) -> tuple[Tensor, ...]:
        own = _of(options, part)
        sides = _sides(x[part], y[part], own)
        cost = torch.ops.mlot.pairwise_cost_forward(*sides, metric, "triton")
        grad_cost, *rest = torch.ops.mlot.sinkhorn_backward(
            grad_transported[part],
            grad_regularized[part],
            cost.new_empty(0),
            cost,
            *own[:5],
            *(tensor[part] for tensor in saved),
            *own[5:],
            False,
            "triton",
        )
        del cost
        return *torch.ops.mlot.pairwise_cost_backward(grad_cost, *sides, metric, *needed, "triton"), *rest

    return _in_parts(x, y, run)


def _in_parts(x: Tensor, y: Tensor, run: Callable[[slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What ``run`` makes of all problems, called for as many at a time as scratch can hold."""
    B = x.shape[0]
    problems = max(SCRATCH // max(x.shape[1] * y.shape[1], 1), 1)
    if problems >= B:
        return run(slice(None))
    outputs: list[Tensor] = []
    for start in range(0, B, problems):
        part = slice(start, start + problems)
        found = run(part)
        if not outputs:
            outputs = [out if out.shape == (0,) else out.new_empty(B, *out.shape[1:]) for out in found]
        for whole, out in zip(outputs, found, strict=True):
            if out.shape != (0,):
                whole[part] = out
    return tuple(outputs)


def _sides(x: Tensor, y: Tensor, options: TransportOptions) -> tuple[Tensor, Tensor]:
    """Both sides, with zeros where nothing counts if that can be."""
    ragged = (options.row_lengths, options.column_lengths, options.row_marginal, options.column_marginal)
    return (x, y) if all(tensor is None for tensor in ragged) else counted(x, y, options)


def _of(options: TransportOptions, part: slice) -> TransportOptions:
    return TransportOptions._make(x[part] if isinstance(x, Tensor) else x for x in options)


def _split(arguments: tuple[Any, ...]) -> tuple[str, TransportOptions]:
    return arguments[5], TransportOptions(*arguments[:5], *arguments[6:12])
