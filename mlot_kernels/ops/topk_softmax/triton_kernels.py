"""topk_softmax on a GPU: a row's statistics, the columns of ``triton_select``, the gradient of ``triton_gradient``."""

from __future__ import annotations

from torch import Tensor

from mlot_kernels import triton_rows as rows
from mlot_kernels.triton_gradient import gradient_at_columns
from mlot_kernels.triton_select import largest_columns


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
    scalars = rows.statistics(values, index, (temperature,), standardize, vocab_size)
    peak, log_total, expected, mean, scale, slope = scalars.without_temperatures()
    behind = index < 0
    columns = largest_columns(values, index, column_mask, vocab_size, k).masked_fill(behind[..., None], 0)
    log_p = rows.gather(values, index, column_mask, log_scale, columns, scalars, (temperature,), vocab_size)
    lse = (peak / (temperature * scale) + log_total).masked_fill(behind, 0)
    return log_p[0], columns, lse, peak, log_total, expected, mean, scale, slope


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
    return gradient_at_columns(
        grad_log_probabilities[None],
        None,
        None,
        grad_lse.contiguous(),
        values,
        index,
        column_mask,
        columns,
        rows.Scalars(peak, log_total, expected, mean, scale, slope),
        (temperature,),
        vocab_size,
    )
