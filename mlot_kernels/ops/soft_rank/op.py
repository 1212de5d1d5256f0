"""Differentiable ranks of the entries of a row, by isotonic regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.backends import refusing
from mlot_kernels.native import native
from mlot_kernels.ops.soft_rank import reference
from mlot_kernels.registry import differentiable_operator, lazy, once_differentiable, raw_operator

_TRITON = "mlot_kernels.ops.soft_rank.triton_kernels"


def _wider_than(most: int) -> Callable[..., str | None]:
    def refuses(values: Tensor, *_: Any) -> str | None:
        n = values.shape[1]
        return f"its rows have at most {most} entries, got {n}" if n > most else None

    return refuses


FORWARD = {
    "reference": reference.forward,
    "cpu": native("cpu", "soft_rank_forward"),
    "triton": refusing(lazy(_TRITON, "forward"), _wider_than(64)),  # whose pairs are one tile
    "cuda": refusing(native("cuda", "soft_rank_forward"), _wider_than(4096)),  # as in mlot/cuda/soft_rank.h
}
BACKWARD = {
    "reference": reference.backward,
    "cpu": native("cpu", "soft_rank_backward"),
    "triton": lazy(_TRITON, "backward"),
    "cuda": native("cuda", "soft_rank_backward"),
}


def _forward_fake(values: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    ranks = values.new_empty(values.shape, dtype=checks.accumulator(values.dtype))
    return ranks, values.new_empty(values.shape, dtype=torch.int32), values.new_empty(values.shape, dtype=torch.int32)


def _backward_fake(grad: Tensor, values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(values.shape)


_forward = raw_operator(
    "soft_rank_forward(Tensor values, Tensor? lengths, float epsilon, str backend) "
    "-> (Tensor ranks, Tensor order, Tensor block)",
    fake=_forward_fake,
    implementations=FORWARD,
)
_backward = raw_operator(
    "soft_rank_backward(Tensor grad, Tensor values, Tensor order, Tensor block, float epsilon, str backend) -> Tensor",
    fake=_backward_fake,
    implementations=BACKWARD,
)


class SoftRank(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, lengths: Tensor | None, epsilon: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(values, lengths, epsilon, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values, _, ctx.epsilon, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(values, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(grad.contiguous(), *saved, ctx.epsilon, ctx.backend), None, None, None


_operator = differentiable_operator(
    "soft_rank(Tensor values, Tensor? lengths, float epsilon, str backend) "
    "-> (Tensor ranks, Tensor order, Tensor block)",
    fake=_forward_fake,
    function=SoftRank,
    forward=FORWARD,
    backward=BACKWARD,
)


def soft_rank(
    values: Tensor, lengths: Tensor | None = None, *, epsilon: float = 1.0, backend: str | None = None
) -> Tensor:
    """Ranks of the entries of every row that are differentiable in the entries.

    Rank 1 is the smallest entry's, the number of entries the largest one's. The ranks are the point nearest to
    ``values / epsilon`` in the convex hull of all permutations of ``1..n`` (Blondel et al. 2020, arXiv 2002.08871,
    quadratic regularisation). Where sorted neighbours are all at least ``epsilon`` apart, they are the ordinary ranks
    and the gradient is 0; neighbours nearer than that share out the mean of their ranks, linearly in their values. With
    ``epsilon`` at least as large as the range of a row, all its ranks are ``(values - mean) / epsilon + (n + 1) / 2``.

    Equal entries have equal ranks. An infinite entry is beyond every finite one: entries at the same infinity share the
    mean of their ranks, and their gradient is 0. A row with a NaN among its entries is NaN, and so is its gradient.

    Args:
        values: ``[..., n]``, float16, bfloat16, float32 or float64, any strides.
        lengths: ``[...]`` int32 or int64, how many entries each row has, from the first on; less than 0 counts as 0,
            more than n as n. What lies beyond is not read, its rank and its gradient are 0. None: all rows have n.
        epsilon: in the units of ``values``; at least the smallest normal number of the result's dtype.
        backend: run on this backend or raise; by default the best one for the device.

    Returns:
        ``[..., n]``, float32 (float64 for float64 values). Differentiable once with respect to ``values``: ``(g - mean
        of g over the block) / epsilon``, a block being entries that are pooled.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or value.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    checks.tensor("values", values, "[..., n]")
    wide = checks.accumulator(values.dtype)
    epsilon = checks.number("epsilon", epsilon, least=torch.finfo(wide).tiny, most=torch.finfo(wide).max)
    if lengths is not None:
        checks.tensor("lengths", lengths, "[...]", checks.INTEGERS)
        checks.sized("lengths", lengths, values.shape[:-1], "[...] with the dimensions of values but the last")
        checks.same_device(values=values, lengths=lengths)
        lengths = lengths.reshape(-1).to(torch.int64)
    rows = values.flatten(0, -2) if values.dim() > 1 else values[None]  # [N, n]
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return _operator(rows, lengths, epsilon, backend=backend)[0].view(values.shape)
