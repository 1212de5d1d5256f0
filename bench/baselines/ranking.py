"""Ranking-loss distillation (arXiv 2409.12545) as its published code has it, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.baselines.rows import wide


def published_ranking(student: Tensor, teacher: Tensor, k: int = 5) -> tuple[Tensor]:
    """``ranking_loss(..., dedup="official", reduction="none")``, ``[B, T, V]`` twice -> ``[B, T]``.

    Both top-k stand side by side, duplicates included. The published code's soft ranks come from torchsort, whose CPU
    form loops over rows; here all rows are ranked at once.
    """
    student, teacher = wide(student), wide(teacher)
    columns = torch.cat((teacher.topk(k).indices, student.topk(k).indices), -1)
    ranks = [_soft_rank(x.gather(-1, columns)) for x in (student, teacher)]
    centred = [rank - rank.mean(-1, keepdim=True) for rank in ranks]
    s, t = (x / x.norm(dim=-1, keepdim=True) for x in centred)
    return (1 - (s * t).sum(-1),)


def _soft_rank(x: Tensor) -> Tensor:
    s, order = x.sort(descending=True)
    weight = torch.arange(x.shape[-1], 0, -1, device=x.device, dtype=x.dtype)
    return torch.zeros_like(s).scatter(-1, order, s - _isotonic(s - weight))


def _isotonic(y: Tensor) -> Tensor:
    """The nearest non-increasing values: at i the least over j <= i of the largest over k >= i of mean y[j..k]."""
    n = y.shape[-1]
    sums = torch.nn.functional.pad(y.cumsum(-1), (1, 0))
    size = torch.arange(n, device=y.device) - torch.arange(n, device=y.device)[:, None] + 1  # of j..k, [j, k]
    means = (sums[..., None, 1:] - sums[..., :-1, None]) / size.clamp(min=1)
    largest = means.masked_fill(size < 1, float("-inf")).flip(-1).cummax(-1).values.flip(-1)
    return largest.masked_fill(size < 1, float("inf")).min(-2).values
