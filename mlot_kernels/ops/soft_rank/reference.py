"""The definition, in plain torch: what every other backend is held against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mlot_kernels.checks import accumulator

_TILE = 2**24  # elements of a temporary [rows, n, n]


def soft_rank(values: Tensor, lengths: Tensor | None, epsilon: float) -> Tensor:
    """Differentiable by autograd; ``[N, n], [N] -> [N, n]``."""
    return torch.cat([_ranked(x, length, epsilon)[0] for x, length in _tiles(values, _lengths(values, lengths))])


def forward(values: Tensor, lengths: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """The ranks, and what backward needs, int32 ``[N, n]`` both and by position in descending order.

    ``order`` is the column at that position; ``block`` the position at which the position's block begins, its
    complement where no gradient passes (infinite values, positions beyond the length), and n for all that counts of a
    row with a NaN.
    """
    parts = [_ranked(x, length, epsilon) for x, length in _tiles(values, _lengths(values, lengths))]
    ranks, order, block = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return ranks, order.to(torch.int32), block.to(torch.int32)


def backward(grad: Tensor, values: Tensor, order: Tensor, block: Tensor, epsilon: float) -> Tensor:
    """``(grad_i - mean of grad over i's block) / epsilon``, in the dtype of ``values``, which are not read."""
    parts = []
    for g, columns, begins in _tiles(grad, order.long(), block):
        g = g.gather(1, columns)
        in_block = begins[:, :, None] == begins[:, None, :]  # [rows, n, n]
        mean = torch.where(in_block, g[:, None, :], 0).sum(-1) / in_block.sum(-1)
        dx = ((g - mean) / epsilon).masked_fill(begins < 0, 0).masked_fill(begins == grad.shape[1], float("nan"))
        parts.append(torch.zeros_like(dx).scatter(1, columns, dx))
    return torch.cat(parts).to(values.dtype)


def _lengths(values: Tensor, lengths: Tensor | None) -> Tensor:
    N, n = values.shape
    if lengths is None:
        return torch.full((N,), n, dtype=torch.int64, device=values.device)
    return lengths.clamp(0, n)


def _tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """So many rows at a time that a temporary of pairs of their entries stays small; one tile at least."""
    n = tensors[0].shape[1]
    yield from zip(*(x.split(max(1, _TILE // max(1, n * n))) for x in tensors), strict=True)


def _ranked(values: Tensor, length: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks by column, ``order`` and ``block`` by position, ``[rows, n]`` each."""
    n = values.shape[1]
    position = torch.arange(n, device=values.device)
    counts = position < length[:, None]  # by column and by position alike: what does not count comes last
    wide = values.to(accumulator(values.dtype)).masked_fill(~counts, float("-inf"))
    with torch.no_grad():
        order = wide.sort(dim=1, descending=True, stable=True).indices
    s = wide.gather(1, order)
    with torch.no_grad():
        begins = _begins(s, length, epsilon)
        start = torch.where(begins, position, 0).cummax(1).values
        has_nan = (s.isnan() & counts).any(1, keepdim=True)
        block = torch.where(counts & s.isfinite(), start, -1 - start).masked_fill(has_nan & counts, n)
    in_block = start[:, :, None] == start[:, None, :]  # [rows, n, n]
    size = in_block.sum(-1)
    # An infinite value is in a block with its equals alone: any number serves for their common value.
    finite = s.masked_fill(~s.isfinite(), 0) * torch.where(has_nan & counts, float("nan"), 1.0).to(s)
    above_mean = torch.where(in_block, finite[:, :, None] - finite[:, None, :], 0).sum(-1) / size
    hard = length[:, None] - start - (size - 1) / 2  # the mean of the ranks that the block shares out
    ranks = (above_mean / epsilon + hard).masked_fill(~counts, 0)
    return torch.zeros_like(ranks).scatter(1, order, ranks), order, block


def _begins(s: Tensor, length: Tensor, epsilon: float) -> Tensor:
    """Whether a block of the isotonic regression begins at each position of the descending ``s``; ``[rows, n]``.

    The regression is the slope of the least concave majorant of the cumulative sums, and its blocks meet where the
    majorant touches them: where every mean of neighbours that ends here is at least every mean that begins here. With
    m neighbours in front and p from here on, the two means of ``s`` are then at least ``epsilon (m + p) / 2`` apart.
    """
    n = s.shape[1]
    if n == 0:  # amin has nothing to reduce
        return s.isnan()
    here, other = torch.arange(n, device=s.device)[:, None], torch.arange(n, device=s.device)[None, :]
    here_s, other_s = s[:, :, None], s[:, None, :]
    drop = torch.where(here_s == other_s, 0, (here_s - other_s).abs())  # [rows, here, other]; inf - inf is no drop
    in_front = other < here
    sums = torch.where(in_front, drop, 0).flip(2).cumsum(2).flip(2)
    m = (here - other).clamp(min=1)
    left = torch.where(in_front, sums / m - m * (epsilon / 2), float("inf")).amin(2)
    behind = (other >= here) & (other < length[:, None, None])
    sums = torch.where(behind, drop, 0).cumsum(2)
    p = (other - here + 1).clamp(min=1)
    right = torch.where(behind, sums / p - p * (epsilon / 2), float("inf")).amin(2)
    return left >= -right  # inf on the left of the first position, on the right beyond the length
