"""A pair of rows as the kernels of row_divergence go over it: which columns meet, as logarithms of softmax.

Both rows go the same way through the same operations, so that equal ones stay equal to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.logits import Side
from mlot_kernels.ops.row_divergence.reference import Options
from mlot_kernels.ops.row_divergence.triton_terms import Constants
from mlot_kernels.triton_rows import bits_of, double_of, load_columns, row_of


class Saved(NamedTuple):
    """What forward leaves of a side, in the schema's order; ``[B, A]``."""

    peak: Tensor
    log_total: Tensor
    mean: Tensor
    scale: Tensor
    slope: Tensor
    total: Tensor
    moment: Tensor


class Numbers(NamedTuple):
    """The bits of what ``options`` come to; ``kappa`` is not adaptive_kl's, whose rows have their own."""

    weight: int  # of p in the mixture
    skew: int
    kappa: int
    head: int
    interpolation: int
    floor: int
    log_floor: int


class Row(NamedTuple):
    """One row; the log of its softmax is (x - peak) inverse - log_total."""

    x: Any
    column_mask: Any
    vocab_size: Any
    peak: Any
    inverse: Any
    log_total: Any
    log_scale: Any


def kappa_of(options: Options) -> float:
    """The teacher's, and the opposite of the student's; README.md. 0 for adaptive_kl, whose rows have their own."""
    rest = 1 - options.skew
    return {"forward_kl": 1.0, "reverse_kl": -1.0, "skew_kl": rest, "skew_reverse_kl": -rest}.get(options.kind, 0.0)


def numbers_of(options: Options) -> Numbers:
    weight = {"jsd": options.beta, "skew_kl": options.skew, "skew_reverse_kl": 1 - options.skew}.get(options.kind, 0.0)
    log_floor = math.log(options.floor) if options.floor > 0 else 0.0  # unused where there is none
    own = options.skew, kappa_of(options), options.head, options.interpolation, options.floor
    return Numbers(*map(bits_of, (weight, *own, log_floor)))


def are_whole(sides: Sequence[Side], options: Options) -> bool:
    """Whether every column meets, and none counts as a floor."""
    return options.column_pairs is None and options.floor == 0 and all(side.column_mask is None for side in sides)


@triton.jit
def row_at(side, saved, slot, slots):
    """The row that ``slot`` names, and whether it counts."""
    acc: tl.constexpr = saved.peak.dtype.element_ty
    x_ptr, counts = row_of(side.x, side.rows, slot, slots, side.batch_stride, side.row_stride)
    peak = tl.load(saved.peak + slot)
    scale = tl.where(counts, tl.load(saved.scale + slot), 1.0).to(tl.float64)
    inverse = (1 / (double_of(side.temperature_bits) * scale)).to(acc)
    log_scale = tl.zeros([], acc)
    if side.log_scale is not None:
        log_scale = tl.load(side.log_scale + slot, mask=counts, other=0).to(acc)
    log_total = tl.load(saved.log_total + slot)
    return Row(x_ptr, side.column_mask, side.vocab_size, peak, inverse, log_total, log_scale), counts


@triton.jit
def constants_of(s_row, t_row, numbers, share, KIND: tl.constexpr):
    """What ``triton_terms.terms`` needs of a pair of rows, in the dtype of ``share``."""
    wide: tl.constexpr = share.dtype
    s_log_scale, t_log_scale = s_row.log_scale.to(wide), t_row.log_scale.to(wide)
    kappa = double_of(numbers.kappa).to(wide)
    if KIND == "adaptive_kl":
        kappa = 2.0 * share - 1.0
    return Constants(
        tl.exp(s_log_scale),
        tl.exp(t_log_scale),
        t_log_scale - s_log_scale,
        double_of(numbers.weight).to(wide),
        share,
        double_of(numbers.skew).to(wide),
        kappa,
        double_of(numbers.floor).to(wide),
        double_of(numbers.log_floor).to(wide),
        s_log_scale,
        t_log_scale,
    )


@triton.jit
def below_peak(row, columns, whole, end):
    """x - peak at a tile of ``columns`` in front of ``end``, -inf from there on; ``whole``: none of them is."""
    return load_columns(row.x, columns, whole, end, row.peak.dtype) - row.peak


@triton.jit
def columns_at(pairs_ptr, pairs, side, row, here):
    """The columns of one ``side`` that pairs name, -1 where there is no such one; int32, to take fewer registers."""
    columns = tl.load(pairs_ptr + 2 * pairs.to(tl.int64) + side, mask=here, other=0)
    return tl.where((columns >= 0) & (columns < row.vocab_size), columns, -1).to(tl.int32)


@triton.jit
def below_peak_at(row, columns, here):
    """x - peak at any ``columns``, NaN where these are -1, -inf where not ``here``."""
    x = tl.load(row.x + columns, mask=here & (columns >= 0), other=float("-inf")).to(row.peak.dtype)
    return tl.where(here & (columns < 0), float("nan"), x - row.peak)


@triton.jit
def log_softmaxes(s_row, s_below, t_row, t_below, target_log_total, numbers, MIXES: tl.constexpr):
    """log q and log p from x - peak, in the dtype of ``target_log_total``; under MIXES p is of the mixed logits."""
    wide: tl.constexpr = target_log_total.dtype
    s_scaled = s_below * s_row.inverse
    t_scaled = t_below * t_row.inverse
    log_q = (s_scaled - s_row.log_total).to(wide)
    if MIXES:
        log_p = mixed(s_scaled.to(wide), t_scaled.to(wide), numbers) - target_log_total
    else:
        log_p = (t_scaled - t_row.log_total).to(wide)
    return log_q, log_p


@triton.jit
def mixed(own, other, numbers):
    """The logits that TAID mixes, each relative to its row's peak; equal ones stay the same."""
    absent = (own == float("-inf")) | (other == float("-inf"))
    interpolation = double_of(numbers.interpolation).to(own.dtype)
    return tl.where(absent, float("-inf"), own + interpolation * (other - own))


@triton.jit
def looked_at(s_row, s_columns, t_row, t_columns, here, log_q, log_p):
    """The same log q and log p, -inf where either side does not look; NaN stays."""
    if s_row.column_mask is not None:
        log_q = _where_looked_at(s_row, s_columns, here, log_q)
        log_p = _where_looked_at(s_row, s_columns, here, log_p)
    if t_row.column_mask is not None:
        log_q = _where_looked_at(t_row, t_columns, here, log_q)
        log_p = _where_looked_at(t_row, t_columns, here, log_p)
    return log_q, log_p


@triton.jit
def _where_looked_at(row, columns, here, log_softmax):
    looked_at = tl.load(row.column_mask + columns, mask=here & (columns >= 0), other=1) != 0
    return tl.where(looked_at | (log_softmax != log_softmax), log_softmax, float("-inf"))


@triton.jit
def load_pair(s_row, t_row, pairs_ptr, start, end, BLOCK: tl.constexpr):
    """Columns that meet, ``start .. start + BLOCK - 1`` of ``end``: x - peak of both sides, and which columns they are.

    -inf from ``end`` on.
    """
    columns = start + tl.arange(0, BLOCK)
    here = columns < end
    if pairs_ptr is None:
        s_columns, t_columns = columns, columns
        s_below = below_peak(s_row, columns, start + BLOCK <= end, end)
        t_below = below_peak(t_row, columns, start + BLOCK <= end, end)
    else:
        s_columns = columns_at(pairs_ptr, columns, 0, s_row, here)
        t_columns = columns_at(pairs_ptr, columns, 1, t_row, here)
        s_below = below_peak_at(s_row, s_columns, here)
        t_below = below_peak_at(t_row, t_columns, here)
    return s_below, t_below, s_columns, t_columns, here
