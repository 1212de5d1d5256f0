"""The definition, in plain torch: what every other backend is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from mlot_kernels.logits import (
    counted_rows,
    log_probabilities,
    looked_at,
    normalise,
    row_statistics,
    spread_rows,
    values_gradient,
)


def row_entropy(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    temperature: float,
    standardize: bool,
    vocab_size: int,
) -> Tensor:
    """Differentiable by autograd; ``[B, A]``."""
    log_p = log_probabilities(values, index, column_mask, log_scale, temperature, standardize, vocab_size)
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0)).sum(-1).masked_fill(index < 0, 0)


def forward(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    temperature: float,
    standardize: bool,
    vocab_size: int,
) -> tuple[Tensor, ...]:
    x = counted_rows(values, index)[..., :vocab_size]  # [B, A, V]
    peak, mean, scale, slope = row_statistics(x, standardize)
    log_q, log_total, expected = normalise(x, peak, scale, temperature)
    p, log_p = _distribution(log_q, column_mask, log_scale, index)
    entropy = -(p * log_p).sum(-1)
    mass = p.sum(-1)
    # W / grad; where p = 0 nothing is added, x - m may be -inf there
    below = torch.where(p > 0, (log_p + 1) * (x - peak[..., None]), p)
    moment = (mass - entropy) * expected - (p * below).sum(-1)
    outputs = (entropy, mass, peak, log_total, mean, scale, slope, moment)
    return tuple(output.masked_fill(index < 0, 0) for output in outputs)


def backward(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    entropy: Tensor,
    mass: Tensor,
    peak: Tensor,
    log_total: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: Tensor,
    moment: Tensor,
    temperature: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """``g_v = grad * (q_v (M - H) - p_v (log p_v + 1))``; the log scale gets ``grad * (H - M)``."""
    x = counted_rows(values, index)[..., :vocab_size]
    scale = scale.masked_fill(index < 0, 1)
    below = x - peak[..., None]
    log_q = below / (temperature * scale[..., None]) - log_total[..., None]
    p, log_p = _distribution(log_q, column_mask, log_scale, index)
    g = grad[..., None] * (log_q.exp() * (mass - entropy)[..., None] - p * (log_p + 1))
    dx = values_gradient(g, grad * moment, below, mean, scale, slope, temperature)
    return spread_rows(dx, values, index), grad * (entropy - mass)


def _distribution(
    log_q: Tensor, column_mask: Tensor | None, log_scale: Tensor | None, index: Tensor
) -> tuple[Tensor, Tensor]:
    """p over the columns that are looked at, and its log with 0 in place of -inf where p = 0, both ``[B, A, V]``."""
    log_p = looked_at(log_q, index, column_mask, log_scale)
    p = log_p.exp()
    return p, log_p.masked_fill(p == 0, 0)
