"""How a row of logits becomes a distribution: what callers say of it, and its definition in plain torch.

``log p = log_softmax(values / (temperature * scale)) + log_scale`` over the columns below ``vocab_size``, where
``scale`` is the row's standard deviation + 1e-4 under ``standardize`` and 1 without.

The second half of this page serves the ``reference`` backends of all operators that take ``Logits``. With x the row,
m its maximum, n the number of its columns below ``vocab_size`` that are not -inf, c = 1 / (temperature * scale) and
q = softmax(c x), a loss l with H_v = dl/dlog p_v has

    g_v = H_v - q_v sum(H)                                                                 dl/d(c x_v)
    W   = sum_v g_v x_v = sum_v H_v (x_v - m) - sum(H) E_q[x - m]
    dl/dx_v = c g_v - (x_v - mean) slope W / temperature,     slope = 1 / ((n - 1) std scale^2)

The second term of dl/dx is what the standard deviation passes on; slope is 0 without ``standardize`` and where std = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.rows import Rows

STANDARD_DEVIATION_OFFSET = 1e-4  # of the published Multi-Level-OT code, added after the square root


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits and how to read them; operators take a plain tensor as ``Logits(tensor)``.

    Attributes:
        values: ``[B, T, V]``, or ``[N, V]`` for one sequence of N rows, whose outputs lose the B dimension. float16,
            bfloat16, float32 or float64; any strides with the last dimension contiguous, never copied. ``-inf`` is
            probability 0 and gets gradient 0.
        rows: which positions count; None: all. Outputs are ``[B, A, ...]`` over ``rows.index [B, A]``, zero beyond
            ``rows.count``. Rows that do not count are never read and get gradient 0.
        temperature: above 0.
        standardize: divide each row by its unbiased standard deviation + 1e-4, taken over the columns below
            ``vocab_size`` that are not ``-inf``; the gradient goes through it. Masks must be ``-inf`` here: a column at
            the smallest finite number counts, and makes the deviation as large.
        vocab_size: columns from here on do not belong to the distribution (padding of the embedding); None: V.
        columns: bool ``[V]``, which columns the operator looks at. The normaliser and the standard deviation still run
            over all columns below ``vocab_size``, so that the kept probabilities may sum to less than 1.
        log_scale: ``[B, A]``, added to the row's log-probabilities; differentiable.
    """

    values: Tensor
    rows: Rows | None = None
    temperature: float = 1.0
    standardize: bool = False
    vocab_size: int | None = None
    columns: Tensor | None = None
    log_scale: Tensor | None = None


class Ranked(NamedTuple):
    """Log-probabilities of the counted rows at k columns.

    Attributes:
        log_probabilities: ``[R, B, A, k]``, float32 (float64 for float64 logits), at ``logits.temperature`` and then at
            each temperature of ``also_at``; 0 beyond the counted rows.
        columns: int64, ``[B, k]``, or ``[B, A, k]`` for scope ``"token"``.
        kept_mass: ``[B, A]``, the sum of the k probabilities at ``logits.temperature``; 0 beyond the counted rows.
    """

    log_probabilities: Tensor
    columns: Tensor
    kept_mass: Tensor


class Side(NamedTuple):
    """Checked ``Logits`` as the operators' schemas have them, one of one or two sides."""

    values: Tensor  # [B, T, V]
    row_index: Tensor  # [B, A]; not `index`, which every tuple has
    column_mask: Tensor | None  # [V]
    log_scale: Tensor | None  # [B, A]
    temperature: float
    standardize: bool
    vocab_size: int


@dataclass(frozen=True)
class Prepared:
    """Checked ``Logits``, and whether they came without a B dimension."""

    side: Side
    one_sequence: bool

    def restore(self, output: Tensor, dimension: int = 0) -> Tensor:
        """``output`` without its B dimension where the logits had none."""
        return output.squeeze(dimension) if self.one_sequence else output


def prepare(logits: Any, name: str = "logits") -> Prepared:
    """Check what a caller passed as logits.

    Args:
        name: the argument's name, for messages.

    Raises:
        TypeError, ValueError: a field has another type, dtype, shape, device or range; the message names it.
    """
    if isinstance(logits, Tensor):
        logits = Logits(logits)
    elif not isinstance(logits, Logits):
        raise TypeError(f"{name} must be a tensor or Logits, got {type(logits).__name__}")
    values = checks.tensor(f"{name}.values", logits.values, "[B, T, V] or [N, V]")
    one_sequence = values.dim() == 2
    if one_sequence:
        values = values.unsqueeze(0)
    B, T, V = values.shape
    if V == 0:
        raise ValueError(f"{name}.values must have at least one column, got shape {tuple(logits.values.shape)}")
    if V > 1 and values.stride(2) != 1:
        raise ValueError(
            f"the last dimension of {name}.values must be contiguous, got strides {values.stride()}; call .contiguous()"
        )
    rows = logits.rows
    if rows is None:
        rows = Rows.every(B, T, values.device)
    elif not isinstance(rows, Rows):
        raise TypeError(f"{name}.rows must be Rows, got {type(rows).__name__}; make them with Rows.from_labels")
    checks.tensor(f"{name}.rows.index", rows.index, "[B, A]", (torch.int64,))
    checks.sized(f"{name}.rows.index", rows.index, (B, rows.index.shape[1]), "[B, A] for values of B sequences")
    rows.check_length(T, f"{name}.rows", f"{name}.values")
    vocab_size = V
    if logits.vocab_size is not None:
        vocab_size = checks.integer(f"{name}.vocab_size", logits.vocab_size, 1, V, "the width of values")
    if logits.columns is not None:
        checks.tensor(f"{name}.columns", logits.columns, "[V]", (torch.bool,))
        checks.sized(f"{name}.columns", logits.columns, (V,), "[V] as values")
    log_scale = logits.log_scale
    if log_scale is not None:
        if one_sequence and isinstance(log_scale, Tensor) and log_scale.dim() == 1:
            log_scale = log_scale.unsqueeze(0)
        checks.tensor(f"{name}.log_scale", log_scale, "[B, A]")
        checks.sized(f"{name}.log_scale", log_scale, rows.index.shape, "[B, A] as its rows")
    checks.same_device(
        **{
            f"{name}.values": values,
            f"{name}.rows": rows.index,
            f"{name}.columns": logits.columns,
            f"{name}.log_scale": log_scale,
        }
    )
    side = Side(
        values,
        rows.index,
        logits.columns,
        log_scale,
        checks.number(f"{name}.temperature", logits.temperature, above=0),
        checks.boolean(f"{name}.standardize", logits.standardize),
        vocab_size,
    )
    return Prepared(side, one_sequence)


# The definition, differentiable by autograd.


def log_probabilities(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    temperature: float,
    standardize: bool,
    vocab_size: int,
) -> Tensor:
    """``log p`` ``[B, A, vocab_size]`` of the counted rows; -inf at columns that are not looked at.

    Beyond the counted rows it is finite and means nothing.
    """
    log_q = scaled_rows(values, index, temperature, standardize, vocab_size).log_softmax(-1)
    return looked_at(log_q, index, column_mask, log_scale)


def looked_at(log_q: Tensor, index: Tensor, column_mask: Tensor | None, log_scale: Tensor | None) -> Tensor:
    """``log p`` from the rows' log-softmax ``[B, A, V]``: plus the log scale, -inf at columns left out."""
    log_p = log_q if log_scale is None else log_q + log_scale.to(log_q.dtype).masked_fill(index < 0, 0)[..., None]
    if column_mask is not None:
        log_p = log_p.masked_fill(~column_mask[: log_q.shape[-1]], float("-inf"))
    return log_p


def scaled_rows(values: Tensor, index: Tensor, temperature: float, standardize: bool, vocab_size: int) -> Tensor:
    """The counted rows divided by temperature and scale, c x: ``[B, A, vocab_size]``."""
    x = counted_rows(values, index)[..., :vocab_size]
    present = x != float("-inf")  # NaN is present, so that it shows
    x = x.masked_fill(~present, 0)
    if standardize:
        x = x / (_standard_deviation(x, present)[1] + STANDARD_DEVIATION_OFFSET)
    return (x / temperature).masked_fill(~present, float("-inf"))


def counted_rows(values: Tensor, index: Tensor) -> Tensor:
    """``[B, A, V]``, the rows at ``index`` in the accumulator's dtype; zeros where it is -1, whatever lies there."""
    B, T, V = values.shape
    if T == 0:
        return values.new_zeros(B, index.shape[1], V, dtype=checks.accumulator(values.dtype))
    x = values.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, V))
    return x.to(checks.accumulator(values.dtype)).masked_fill(index[..., None] < 0, 0)


def _standard_deviation(x: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased standard deviation and number of the present columns, ``[..., 1]`` each; 0 for fewer than two."""
    n = present.sum(-1, keepdim=True)
    mean = x.sum(-1, keepdim=True) / n.clamp(min=1)
    variance = ((x - mean).masked_fill(~present, 0) ** 2).sum(-1, keepdim=True) / (n - 1).clamp(min=1)
    flat = variance == 0  # sqrt has no gradient there
    return mean, variance.masked_fill(flat, 1).sqrt().masked_fill(flat, 0), n


# The explicit forward and backward: what a kernel computes, step by step.


class RowStatistics(NamedTuple):
    """What forward leaves for backward, ``[B, A]`` each. ``peak`` is kept apart from the log of the sum, which a large
    maximum would swallow."""

    peak: Tensor  # m
    mean: Tensor  # of x - m, which keeps its digits far from 0; 0 without standardize
    scale: Tensor  # std + 1e-4, or 1
    slope: Tensor  # 1 / ((n - 1) std scale^2), or 0


def row_statistics(x: Tensor, standardize: bool) -> RowStatistics:
    """Statistics of rows ``x`` ``[B, A, vocab_size]``."""
    peak = x.amax(-1)
    if not standardize:
        return RowStatistics(peak, torch.zeros_like(peak), torch.ones_like(peak), torch.zeros_like(peak))
    below = x - peak[..., None]
    present = below != float("-inf")
    mean, deviation, n = (s.squeeze(-1) for s in _standard_deviation(below.masked_fill(~present, 0), present))
    scale = deviation + STANDARD_DEVIATION_OFFSET
    slope = (1 / ((n - 1) * deviation * scale**2)).masked_fill((deviation == 0) | (n < 2), 0)
    return RowStatistics(peak, mean, scale, slope)


def normalise(x: Tensor, peak: Tensor, scale: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """``log q`` ``[B, A, V]``, the log of its normaliser and E_q[x - m], ``[B, A]`` each."""
    below = x - peak[..., None]
    shifted = below / (temperature * scale[..., None])
    e = shifted.exp()
    total = e.sum(-1)
    expected = torch.where(e > 0, e * below, e).sum(-1) / total  # 0 * -inf is 0 here; a NaN stays
    log_total = total.log()
    return shifted - log_total[..., None], log_total, expected


def values_gradient(
    g: Tensor, W: Tensor, below: Tensor, mean: Tensor, scale: Tensor, slope: Tensor, temperature: float
) -> Tensor:
    """dl/dx ``[B, A, vocab_size]`` from g = dl/d(c x), W = sum g x ``[B, A]`` and x - m, ``below``."""
    dx = g / (temperature * scale[..., None]) - (below - mean[..., None]) * (slope * W / temperature)[..., None]
    return dx.masked_fill(below == float("-inf"), 0)


def at_columns(log_q: Tensor, columns: Tensor, column_mask: Tensor | None) -> Tensor:
    """``log_q`` ``[B, A, V]``, over all V columns, at each row's own ``columns`` ``[B, A, k]``.

    NaN where a column is none of the V; -inf where it is not looked at, but for rows with NaN.
    """
    slots, outside, left_out = _slots(columns, column_mask, log_q.shape[-1])
    kept = log_q.gather(2, slots)
    if left_out is not None:
        kept = kept.masked_fill(left_out & ~kept.isnan(), float("-inf"))
    return kept.masked_fill(outside, float("nan"))


def gradient_at_columns(
    grad_log_p: Tensor,
    grad_lse: Tensor | None,
    x: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    columns: Tensor,
    statistics: RowStatistics,
    log_total: Tensor,
    expected: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """dl/dx ``[B, A, V]`` and dl/dlog_scale ``[B, A]`` of log-probabilities at each row's own columns.

    With H their gradient, G that of lse(c x) and D = sum(H) - G, the row scalars of forward leave no sum over V::

        g_v = H_v - q_v D
        W   = sum_v H_v (x_v - m) - D E_q[x - m] + m (G - sum of H at -inf logits)

    sum(g) = G: the last term is what W owes to the m that was subtracted. It is 0 for log-probabilities alone, unless
    one of them is at a -inf logit, whose x_v is no part of W.

    Args:
        grad_log_p: ``[B, A, k]``; columns that are not looked at or do not exist pass nothing on.
        grad_lse: ``[B, A]``; None: 0.
        x: the counted rows ``[B, A, V]``.
        columns: ``[B, A, k]``; they may repeat.
        log_total, expected: as ``normalise`` returned them.
    """
    peak, mean, scale, slope = statistics
    behind = index < 0
    scale = scale.masked_fill(behind, 1)
    slots, silent, left_out = _slots(columns, column_mask, x.shape[-1])
    if left_out is not None:
        silent = silent | left_out
    H = grad_log_p.masked_fill(silent | behind[..., None], 0)
    G = torch.zeros_like(peak) if grad_lse is None else grad_lse.masked_fill(behind, 0)
    total = H.sum(-1)
    D = total - G

    below = x - peak[..., None]
    log_q = below / (temperature * scale[..., None]) - log_total[..., None]
    g = (-D[..., None] * log_q.exp()).scatter_add(2, slots, H)
    kept = below.gather(2, slots)
    absent = kept == float("-inf")
    W = (H * kept.masked_fill(absent, 0)).sum(-1) - D * expected + peak * (G - H.masked_fill(~absent, 0).sum(-1))
    return values_gradient(g, W, below, mean, scale, slope, temperature), total


def _slots(columns: Tensor, column_mask: Tensor | None, vocab_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """``columns`` brought into the vocabulary, which ones were not in it, and which ones are not looked at."""
    slots = columns.clamp(0, vocab_size - 1)
    return slots, slots != columns, None if column_mask is None else ~column_mask[slots]


def spread_rows(dx: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """``[B, T, V]`` in the dtype of ``values``: rows ``dx`` ``[B, A, vocab_size]`` at ``index``, zero elsewhere."""
    B, T, V = values.shape
    A, vocab_size = dx.shape[1:]
    out = values.new_zeros(B, T, V)
    if A == 0 or T == 0:
        return out
    # The slot of each position, by a scatter of integers whose one crowded target, column T, is dropped.
    slots = torch.arange(A, device=index.device).expand(B, A)
    slot = index.new_full((B, T + 1), -1).scatter(1, index.masked_fill(index < 0, T), slots)[:, :T]
    rows = dx.gather(1, slot.clamp(min=0)[..., None].expand(-1, -1, vocab_size))
    out[..., :vocab_size] = rows.masked_fill(slot[..., None] < 0, 0).to(values.dtype)
    return out
