"""The definition, in plain torch: what every other backend is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from mlot_kernels.logits import (
    RowStatistics,
    at_columns,
    counted_rows,
    gradient_at_columns,
    log_probabilities,
    normalise,
    row_statistics,
    scaled_rows,
    spread_rows,
)


def topk_softmax(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    temperature: float,
    standardize: bool,
    vocab_size: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable by autograd: ``log p`` and the columns ``[B, A, k]``, the log of the normaliser ``[B, A]``."""
    behind = index < 0
    columns = largest(counted_rows(values.detach(), index)[..., :vocab_size], column_mask, k)
    log_p = log_probabilities(values, index, None, log_scale, temperature, standardize, vocab_size)
    scaled = scaled_rows(values, index, temperature, standardize, vocab_size)
    peak = scaled.detach().amax(-1, keepdim=True)
    # Not torch.logsumexp, which makes -inf of a row without any column: that row's log-probabilities are NaN.
    lse = (peak + (scaled - peak).exp().sum(-1, keepdim=True).log()).squeeze(-1)
    return (
        at_columns(log_p, columns, column_mask).masked_fill(behind[..., None], 0),
        columns.masked_fill(behind[..., None], 0),
        lse.masked_fill(behind, 0),
    )


def largest(x: Tensor, column_mask: Tensor | None, k: int) -> Tensor:
    """The columns of the k largest of ``x`` ``[B, A, V]``, as ``[B, A, k]``.

    Descending, lower index first among equals; columns that ``column_mask`` leaves out come last.
    """
    if column_mask is None:
        return x.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    left_out = ~column_mask[: x.shape[-1]]
    order = x.masked_fill(left_out, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    behind = left_out[order].to(torch.uint8).argsort(dim=-1, stable=True)  # behind the -inf that are looked at
    return order.gather(2, behind)[..., :k].contiguous()


def forward(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    temperature: float,
    standardize: bool,
    vocab_size: int,
    k: int,
) -> tuple[Tensor, ...]:
    x = counted_rows(values, index)[..., :vocab_size]  # [B, A, V]
    behind = index < 0
    peak, mean, scale, slope = row_statistics(x, standardize)
    log_q, log_total, expected = normalise(x, peak, scale, temperature)
    columns = largest(x, column_mask, k)
    log_p = log_q if log_scale is None else log_q + log_scale.to(log_q.dtype)[..., None]
    log_p = at_columns(log_p, columns, column_mask)
    lse = peak / (temperature * scale) + log_total
    return (
        log_p.masked_fill(behind[..., None], 0),
        columns.masked_fill(behind[..., None], 0),
        *(output.masked_fill(behind, 0) for output in (lse, peak, log_total, expected, mean, scale, slope)),
    )


def backward(
    grad_log_probabilities: Tensor,
    grad_lse: Tensor,
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    columns: Tensor,
    peak: Tensor,
    log_total: Tensor,
    expected: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: Tensor,
    temperature: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """``g_v = sum_k H_k [v = columns_k] - q_v (sum(H) - grad_lse)``; the log scale gets ``sum(H)``."""
    x = counted_rows(values, index)[..., :vocab_size]  # [B, A, V]
    dx, total = gradient_at_columns(
        grad_log_probabilities,
        grad_lse,
        x,
        index,
        column_mask,
        columns,
        RowStatistics(peak, mean, scale, slope),
        log_total,
        expected,
        temperature,
    )
    return spread_rows(dx, values, index), total
