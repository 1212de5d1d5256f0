"""The definition, in plain torch: what every other backend is held against."""

from __future__ import annotations

from torch import Tensor

from mlot_kernels.logits import (
    RowStatistics,
    at_columns,
    counted_rows,
    gradient_at_columns,
    log_probabilities,
    normalise,
    row_statistics,
    spread_rows,
)


def token_log_probability(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    tokens: Tensor,
    temperature: float,
    standardize: bool,
    vocab_size: int,
) -> Tensor:
    """Differentiable by autograd; ``[B, A]``."""
    log_p = log_probabilities(values, index, None, log_scale, temperature, standardize, vocab_size)
    return at_columns(log_p, tokens[..., None], column_mask).squeeze(-1).masked_fill(index < 0, 0)


def forward(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    tokens: Tensor,
    temperature: float,
    standardize: bool,
    vocab_size: int,
) -> tuple[Tensor, ...]:
    x = counted_rows(values, index)[..., :vocab_size]  # [B, A, V]
    peak, mean, scale, slope = row_statistics(x, standardize)
    log_q, log_total, expected = normalise(x, peak, scale, temperature)
    log_p = at_columns(log_q, tokens[..., None], column_mask).squeeze(-1)  # [B, A]
    if log_scale is not None:
        log_p = log_p + log_scale.to(log_p.dtype)
    outputs = (log_p, peak, log_total, expected, mean, scale, slope)
    return tuple(output.masked_fill(index < 0, 0) for output in outputs)


def backward(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    tokens: Tensor,
    peak: Tensor,
    log_total: Tensor,
    expected: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: Tensor,
    temperature: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """``g_v = grad ([v = token] - q_v)``; the log scale gets ``grad``."""
    x = counted_rows(values, index)[..., :vocab_size]  # [B, A, V]
    dx, total = gradient_at_columns(
        grad[..., None],
        None,
        x,
        index,
        column_mask,
        tokens[..., None],
        RowStatistics(peak, mean, scale, slope),
        log_total,
        expected,
        temperature,
    )
    return spread_rows(dx, values, index), total
