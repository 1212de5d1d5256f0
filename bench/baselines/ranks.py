"""Soft ranks as one writes them without this package."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_rank_by_rows(values: Tensor, lengths: Tensor, epsilon: float = 1.0) -> tuple[Tensor]:
    """Sorts with torch, pools each row in Python, and leaves the gradient to autograd, block by block."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    ranks = []
    for row, length in zip(wide, lengths.tolist(), strict=True):
        s, order = row[:length].sort(descending=True, stable=True)
        blocks = _pooled(s.tolist(), epsilon)
        starts = torch.tensor([start for start, _, _ in blocks], dtype=torch.int64)
        sizes = torch.tensor([size for _, size, _ in blocks], dtype=torch.int64)
        block = torch.arange(len(blocks)).repeat_interleave(sizes).to(s.device)
        sums = torch.zeros(len(blocks), dtype=s.dtype, device=s.device).index_add(0, block, s)
        shared = length - starts - (sizes - 1) / 2
        sizes, shared = sizes.to(s.device), shared.to(s)
        soft = (s - (sums / sizes)[block]) / epsilon + shared[block]
        ranks.append(torch.zeros_like(row).scatter(0, order, soft))
    return (torch.stack(ranks),)


def _pooled(s: list[float], epsilon: float) -> list[tuple[int, int, float]]:
    """Start, size and sum of the blocks of descending values."""
    blocks: list[tuple[int, int, float]] = []
    for i, x in enumerate(s):
        start, size, total = i, 1, x
        while blocks:
            before, of_before, its_total = blocks[-1]
            if its_total / of_before - total / size >= epsilon * (of_before + size) / 2:
                break
            start, size, total = before, of_before + size, its_total + total
            blocks.pop()
        blocks.append((start, size, total))
    return blocks
