"""The definition, in plain torch: what every other backend is held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlot_kernels.logits import (
    RowStatistics,
    at_columns,
    counted_rows,
    gradient_at_columns,
    log_probabilities,
    looked_at,
    normalise,
    row_statistics,
    spread_rows,
)

SCOPES = ("sequence", "batch", "token")


def rank_truncate(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    given: Tensor | None,
    temperatures: Sequence[float],
    standardize: bool,
    vocab_size: int,
    k: int,
    scope: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable by autograd: ``log p`` ``[R, B, A, k]``, the columns, the kept mass ``[B, A]``.

    Args:
        given: columns that are taken as they are; None: the k first in the ranking at the first temperature.
    """
    at = [
        log_probabilities(values, index, None, log_scale, temperature, standardize, vocab_size)
        for temperature in temperatures
    ]
    columns, poison = _columns(at[0], index, column_mask, given, k, scope)
    kept = torch.stack([at_columns(log_p, _of_each_row(columns, index), column_mask) for log_p in at]) + poison
    behind = index < 0
    return (
        kept.masked_fill(behind[..., None], 0),
        columns,
        kept[0].exp().sum(-1).masked_fill(behind, 0),
    )


def rank(log_p: Tensor, index: Tensor, column_mask: Tensor | None, k: int, scope: str) -> tuple[Tensor, Tensor]:
    """The k columns with the largest sums of probability, and these sums.

    Args:
        log_p: ``[B, A, V]``.

    Returns:
        ``[B, k]`` each, ``[B, A, k]`` for scope ``"token"``. Descending, lower index first among equals, NaN in front;
        columns that ``column_mask`` leaves out come last.
    """
    p = log_p.exp().masked_fill((index < 0)[..., None], 0)
    if scope == "token":
        weight = p
    elif scope == "sequence":
        weight = p.sum(1)
    else:
        weight = p.sum((0, 1)).expand(p.shape[0], -1)
    if column_mask is not None:
        weight = weight.masked_fill(~column_mask[: p.shape[-1]], -1)
    weight, order = weight.sort(dim=-1, descending=True, stable=True)
    return order[..., :k].contiguous(), weight[..., :k]


def forward(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    given: Tensor | None,
    temperatures: Sequence[float],
    standardize: bool,
    vocab_size: int,
    k: int,
    scope: str,
) -> tuple[Tensor, ...]:
    x = counted_rows(values, index)[..., :vocab_size]  # [B, A, V]
    behind = index < 0
    peak, mean, scale, slope = row_statistics(x, standardize)
    normalised = [normalise(x, peak, scale, temperature) for temperature in temperatures]
    at = [looked_at(log_q, index, None, log_scale) for log_q, _, _ in normalised]
    log_total, expected = (torch.stack(part) for part in list(zip(*normalised, strict=True))[1:])
    columns, poison = _columns(at[0], index, column_mask, given, k, scope)
    kept = torch.stack([at_columns(log_p, _of_each_row(columns, index), column_mask) for log_p in at]) + poison
    kept = kept.masked_fill(behind[..., None], 0)
    kept_mass = kept[0].exp().sum(-1)
    saved = (peak, log_total, expected, mean, scale, slope)
    return (
        kept,
        columns,
        *(output.masked_fill(behind, 0) for output in (kept_mass, *saved)),
    )


def backward(
    grad_log_probabilities: Tensor,
    grad_kept_mass: Tensor,
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    columns: Tensor,
    log_probabilities: Tensor,
    peak: Tensor,
    log_total: Tensor,
    expected: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: Tensor,
    temperatures: Sequence[float],
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """``H = dl/dlog p`` on the kept columns, then what logits.py says, for each temperature."""
    x = counted_rows(values, index)[..., :vocab_size]  # [B, A, V]
    statistics = RowStatistics(peak, mean, scale, slope)
    dx, grad_log_scale = torch.zeros_like(x), torch.zeros_like(peak)
    for r, temperature in enumerate(temperatures):
        H = grad_log_probabilities[r]  # [B, A, k]
        if r == 0:
            H = H + grad_kept_mass[..., None] * log_probabilities[0].exp()
        more, total = gradient_at_columns(
            H,
            None,
            x,
            index,
            column_mask,
            _of_each_row(columns, index),
            statistics,
            log_total[r],
            expected[r],
            temperature,
        )
        dx, grad_log_scale = dx + more, grad_log_scale + total
    return spread_rows(dx, values, index), grad_log_scale


def _columns(
    log_p: Tensor, index: Tensor, column_mask: Tensor | None, given: Tensor | None, k: int, scope: str
) -> tuple[Tensor, Tensor]:
    """The columns, and what is added to every log-probability so that a NaN shows in all that was ranked with it."""
    if given is not None:
        return given.clone(), log_p.new_zeros(())
    columns, weight = rank(log_p.detach(), index, column_mask, k, scope)
    first = weight[..., :1]
    poison = torch.where(first.isnan(), first, 0)  # NaN sorts first
    return columns, poison if scope == "token" else poison[:, None]


def _of_each_row(columns: Tensor, index: Tensor) -> Tensor:
    """``[B, A, k]`` of columns ``[B, k]`` that all rows of a sequence share, or that already."""
    return columns if columns.dim() == 3 else columns[:, None].expand(-1, index.shape[1], -1)
