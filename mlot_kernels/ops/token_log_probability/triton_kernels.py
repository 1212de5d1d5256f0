"""token_log_probability on a GPU: a row's statistics, one gathered logit, and the gradient of ``triton_gradient``."""

from __future__ import annotations

from torch import Tensor

from mlot_kernels import triton_rows as rows
from mlot_kernels.triton_gradient import gradient_at_columns


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
    scalars = rows.statistics(values, index, (temperature,), standardize, vocab_size)
    columns = tokens[..., None]
    log_p = rows.gather(values, index, column_mask, log_scale, columns, scalars, (temperature,), vocab_size)
    return log_p[0, ..., 0], *scalars.without_temperatures()


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
    return gradient_at_columns(
        grad[None, ..., None],
        None,
        None,
        None,
        values,
        index,
        column_mask,
        tokens[..., None],
        rows.Scalars(peak, log_total, expected, mean, scale, slope),
        (temperature,),
        vocab_size,
    )
