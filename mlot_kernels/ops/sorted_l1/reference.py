"""The definition, in plain torch: what every other backend is held against."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlot_kernels.logits import (
    Side,
    counted_rows,
    log_probabilities,
    looked_at,
    normalise,
    row_statistics,
    spread_rows,
    values_gradient,
)
from mlot_kernels.sides import where_both_count

TIES = ("mean", "stable")
TAILS = ("bucket", "drop")
STEPS = (64, 2)
"""What a kernel may leave of each row's signs for backward: thresholds and signs; README.md has the form."""


def sorted_l1(student: Side, teacher: Side, ties: str, top_k: int, tail: str) -> Tensor:
    """Differentiable by autograd; ``[B, A]``."""
    p, q = (log_probabilities(*side).exp() for side in (student, teacher))  # [B, A, V] each
    loss, for_student, for_teacher = compare(p.detach(), q.detach(), student, teacher, ties, top_k, tail)
    # The signs are constants of the order, so that sum s (p - q) has the loss's gradient; its value would cancel.
    slope = (for_student * p).sum(-1) + (for_teacher * q).sum(-1)
    return where_both_count(loss + slope - slope.detach(), student.row_index, teacher.row_index)


def compare(
    p: Tensor, q: Tensor, student: Side, teacher: Side, ties: str, top_k: int, tail: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss ``[B, A]``, and its derivatives by p ``[B, A, V_s]`` and q ``[B, A, V_t]``, which are signs or their
    means.

    A NaN in either side's row makes all of them NaN there.
    """
    keys = [_keys(side) for side in (student, teacher)]
    orders = [key.argsort(dim=-1, descending=True, stable=True) for key in keys]
    width = max(p.shape[-1], q.shape[-1])
    p_sorted, q_sorted = (
        torch.nn.functional.pad(x.gather(-1, order), (0, width - x.shape[-1]))
        for x, order in zip((p, q), orders, strict=True)
    )
    difference = p_sorted - q_sorted  # [B, A, width]
    sign = torch.where(difference.isnan(), difference, difference.sign())  # sign of NaN is 0
    if top_k < width:
        beyond = difference[..., top_k:].sum(-1, keepdim=True)
        if tail == "drop":
            beyond = 0 * beyond
        difference = torch.cat((difference[..., :top_k], beyond), -1)
        beyond = torch.where(beyond.isnan(), beyond, beyond.sign())
        sign = torch.cat((sign[..., :top_k], beyond.expand(*sign.shape[:-1], width - top_k)), -1)
    derivatives = []
    for key, order, direction in zip(keys, orders, (1, -1), strict=True):
        own = direction * sign[..., : key.shape[-1]]
        if ties == "mean":
            own = _mean_over_ties(own, key.gather(-1, order))
        derivatives.append(torch.empty_like(own).scatter(-1, order, own))
    return difference.abs().sum(-1), derivatives[0], derivatives[1]


def _keys(side: Side) -> Tensor:
    """What is sorted: the logits, of which the probabilities are a growing function; -inf at columns left out."""
    x = counted_rows(side.values.detach(), side.row_index)[..., : side.vocab_size]
    return x if side.column_mask is None else x.masked_fill(~side.column_mask[: side.vocab_size], float("-inf"))


def _mean_over_ties(sign: Tensor, key: Tensor) -> Tensor:
    """``sign``, in sorted order, averaged over each run of equal keys. Sums of signs are whole numbers: exact."""
    first = torch.ones_like(key, dtype=torch.bool)
    first[..., 1:] = key[..., 1:] != key[..., :-1]
    run = first.cumsum(-1) - 1
    total, length = (
        torch.zeros_like(sign).scatter_add(-1, run, x).gather(-1, run) for x in (sign, torch.ones_like(sign))
    )
    return total / length


# The explicit forward and backward: what a kernel computes, step by step.


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The loss, and each side's row scalars for its gradient; arguments as in the schema."""
    student, teacher = Side(*arguments[:7]), Side(*arguments[7:14])
    distributions = [_distribution(side) for side in (student, teacher)]
    loss, *derivatives = compare(distributions[0].p, distributions[1].p, student, teacher, *arguments[14:])
    saved: list[Tensor] = []
    for side, d, derivative in zip((student, teacher), distributions, derivatives, strict=True):
        H = derivative * d.p  # dloss/dlog p
        total = H.sum(-1)
        moment = (H * d.below.masked_fill(d.below == float("-inf"), 0)).sum(-1) - total * d.expected
        scalars = (d.peak, d.log_total, d.mean, d.scale, d.slope, total, moment)
        saved += [scalar.masked_fill(side.row_index < 0, 0) for scalar in scalars]
        saved.append(total.new_zeros(*total.shape, *STEPS))  # backward sorts again
    return where_both_count(loss, student.row_index, teacher.row_index), *saved


def backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """``g = H - q sum(H)``, H = sign p; the signs are found again by sorting. A side that is not needed is empty."""
    sides = Side(*arguments[:7]), Side(*arguments[7:14])
    options, saved, needed = arguments[14:17], arguments[17:33], arguments[33:]
    distributions = [_distribution(side) for side in sides]
    _, *derivatives = compare(distributions[0].p, distributions[1].p, *sides, *options)
    gradients: list[Tensor] = []
    for i, (side, d, derivative) in enumerate(zip(sides, distributions, derivatives, strict=True)):
        total, moment = saved[8 * i + 5 : 8 * i + 7]
        if not needed[i]:
            gradients += [side.values.new_empty(0), grad.new_empty(0)]
            continue
        g = derivative * d.p - d.q * total[..., None]
        dx = values_gradient(
            grad[..., None] * g, grad * moment, d.below, d.mean, d.scale, d.slope, side.temperature
        ).masked_fill(sides[1 - i].row_index[..., None] < 0, 0)
        grad_log_scale = (grad * total).masked_fill(sides[1 - i].row_index < 0, 0)
        gradients += [spread_rows(dx, side.values, side.row_index), grad_log_scale]
    return tuple(gradients)


class _Distribution(NamedTuple):
    below: Tensor  # x - m, [B, A, vocab_size]
    q: Tensor  # softmax of the row, over all of it
    p: Tensor  # with the log scale, over the columns that are looked at
    peak: Tensor  # [B, A], as are the rest
    log_total: Tensor
    expected: Tensor
    mean: Tensor
    scale: Tensor
    slope: Tensor


def _distribution(side: Side) -> _Distribution:
    x = counted_rows(side.values, side.row_index)[..., : side.vocab_size]
    statistics = row_statistics(x, side.standardize)
    log_q, log_total, expected = normalise(x, statistics.peak, statistics.scale, side.temperature)
    log_p = looked_at(log_q, side.row_index, side.column_mask, side.log_scale)
    peak, mean, scale, slope = statistics
    return _Distribution(x - peak[..., None], log_q.exp(), log_p.exp(), peak, log_total, expected, mean, scale, slope)
