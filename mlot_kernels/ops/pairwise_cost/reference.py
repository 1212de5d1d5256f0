"""The definition, in plain torch: what every other backend is held against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mlot_kernels.checks import accumulator

SMALLEST_NORM = 1e-8  # of torch.nn.functional.cosine_similarity
_TILE = 2**24  # elements of a temporary [B, rows, N, D]


def pairwise_cost(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Differentiable by autograd; ``[B, M, D], [B, N, D] -> [B, M, N]``."""
    wide = accumulator(torch.promote_types(x.dtype, y.dtype))
    x, y = x.to(wide)[:, :, None], y.to(wide)[:, None]  # [B, M, 1, D], [B, 1, N, D]
    if metric == "l1":
        return (x - y).abs().sum(-1)
    if metric == "l2":
        square = ((x - y) ** 2).sum(-1)
        return square.masked_fill(square == 0, 1).sqrt().masked_fill(square == 0, 0)  # sqrt has no gradient at 0
    if metric == "sqeuclidean":
        return ((x - y) ** 2).sum(-1)
    if metric == "cosine":
        return 1 - (_unit(x) * _unit(y)).sum(-1)
    return -(x * torch.where((x == 0) & (y == 0), 1, y).log()).sum(-1)


def _unit(x: Tensor) -> Tensor:
    square = (x**2).sum(-1, keepdim=True)
    small = square <= SMALLEST_NORM**2
    return x / square.masked_fill(small, 1).sqrt().masked_fill(small, SMALLEST_NORM)


def forward(x: Tensor, y: Tensor, metric: str) -> Tensor:
    return torch.cat([pairwise_cost(rows, y, metric) for rows in _tiles(x, y)], 1)


def backward(grad: Tensor, x: Tensor, y: Tensor, metric: str, x_needed: bool, y_needed: bool) -> tuple[Tensor, Tensor]:
    """Each metric's derivative summed over the other side; a side that is not needed comes back empty."""
    wide = grad.dtype
    grad_x, grad_y = [], y.new_zeros(y.shape, dtype=wide)
    start = 0
    for rows in _tiles(x, y):
        G = grad[:, start : start + rows.shape[1], :, None]  # [B, rows, N, 1]
        start += rows.shape[1]
        for_x, for_y = _derivatives(G, rows.to(wide)[:, :, None], y.to(wide)[:, None], metric)
        grad_x.append(for_x.sum(2))
        grad_y += for_y.sum(1)
    return (
        torch.cat(grad_x, 1).to(x.dtype) if x_needed else x.new_empty(0),
        grad_y.to(y.dtype) if y_needed else y.new_empty(0),
    )


def _derivatives(G: Tensor, x: Tensor, y: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """``grad * dcost/dx`` and ``grad * dcost/dy``, ``[B, rows, N, D]`` each."""
    if metric == "cosine":
        x_norm, y_norm = (v.norm(dim=-1, keepdim=True) for v in (x, y))
        x_unit, y_unit = x / x_norm.clamp(min=SMALLEST_NORM), y / y_norm.clamp(min=SMALLEST_NORM)
        similarity = (x_unit * y_unit).sum(-1, keepdim=True)
        # below the smallest norm the divisor is a constant and passes nothing on
        for_x = y_unit - similarity * x_unit * (x_norm > SMALLEST_NORM)
        for_y = x_unit - similarity * y_unit * (y_norm > SMALLEST_NORM)
        return -G * for_x / x_norm.clamp(min=SMALLEST_NORM), -G * for_y / y_norm.clamp(min=SMALLEST_NORM)
    if metric == "cross_entropy":
        dead = (G == 0) | (x == 0)  # an infinite cost that nothing depends on; a term that is not there
        return -G * torch.where(dead & (y == 0), 1, y).log(), -torch.where(dead, 0, G * x / y)
    difference = x - y
    if metric == "l1":
        for_x = G * torch.where(difference.isnan(), difference, difference.sign())  # sign of NaN is 0
    elif metric == "sqeuclidean":
        for_x = 2 * G * difference
    else:
        distance = (difference**2).sum(-1, keepdim=True).sqrt()
        for_x = G * difference / distance.masked_fill(distance == 0, 1)
    return for_x, -for_x


def _tiles(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """``x`` in pieces of so many rows that a temporary of the pieces against all of ``y`` stays small."""
    return iter(x.split(max(1, _TILE // max(1, x.shape[0] * y.shape[1] * y.shape[2])), 1))
