"""What the Triton kernels over rows of logits share: tiles, a row's statistics, and log-probabilities at a few columns.

The formulas are those of ``logits.py``. With c = log2(e) / (temperature * scale) everything is made of t = (x - peak) c
and 2^t: the difference comes first, for it is exact near the peak. Sums are float32 (float64 for float64 logits), in an
order that depends on a row's length and on the kernel's tiles alone (``triton_tiles``).

A row is walked in tiles of ``BLOCK`` columns, whole ones without a mask: a mask on the length splits loads into single
elements unless 16 divides it. One program walks one row; a block as wide as the row would not fit into registers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.checks import accumulator
from mlot_kernels.triton_tiles import launch_options

_LOG2E: tl.constexpr = tl.constexpr(1 / math.log(2))
_DEVIATION_OFFSET: tl.constexpr = tl.constexpr(1e-4)


class Scalars(NamedTuple):
    """What forward leaves for backward: ``[B, A]``, of R temperatures ``[R, B, A]``."""

    peak: Tensor
    log_total: Tensor  # [R, B, A]
    expected: Tensor  # [R, B, A]
    mean: Tensor
    scale: Tensor
    slope: Tensor

    def without_temperatures(self) -> tuple[Tensor, ...]:
        """All six as ``[B, A]``, for operators of one temperature."""
        return tuple(scalar.view(scalar.shape[-2:]) for scalar in self)


# One tile


@triton.jit
def load_tile(x_ptr, start, end, acc: tl.constexpr, BLOCK: tl.constexpr):
    """Columns ``start .. start + BLOCK - 1`` ``[BLOCK]``, -inf from ``end`` on."""
    return load_columns(x_ptr, start + tl.arange(0, BLOCK), start + BLOCK <= end, end, acc)


@triton.jit
def load_columns(x_ptr, columns, whole, end, acc: tl.constexpr):
    """A tile of ``columns`` of any shape, -inf from ``end`` on; ``whole``: none of them is."""
    if whole:
        x = tl.load(x_ptr + columns)
    else:
        x = tl.load(x_ptr + columns, mask=columns < end, other=float("-inf"))
    return x.to(acc)


@triton.jit
def store_tile(out_ptr, start, end, x, BLOCK: tl.constexpr):
    """``x`` ``[BLOCK]`` from ``start`` on, in front of ``end``."""
    columns = start + tl.arange(0, BLOCK)
    x = x.to(out_ptr.dtype.element_ty)
    if start + BLOCK <= end:
        tl.store(out_ptr + columns, x)
    else:
        tl.store(out_ptr + columns, x, mask=columns < end)


@triton.jit
def row_of(values_ptr, index_ptr, slot, slots, batch_stride, row_stride):
    """The row that ``slot`` names, and whether it counts. A row may start beyond 2**31 elements."""
    position = tl.load(index_ptr + slot)
    sequence = (slot // slots).to(tl.int64)
    return values_ptr + sequence * batch_stride + tl.maximum(position, 0) * row_stride, position >= 0


@triton.jit
def double_of(bits):
    """The float64 whose bits these are: Triton passes a Python float as float32, and the bits of 0 as an int32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def exponent_factor(temperature_bits, scale, acc: tl.constexpr):
    """What x - peak is multiplied with to be an exponent of 2: log2(e) / (temperature scale), made in float64."""
    return ((1 / (double_of(temperature_bits) * scale.to(tl.float64))) * _LOG2E).to(acc)


def bits_of(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


# Statistics of one row


@triton.jit
def deviation(x_ptr, end, acc: tl.constexpr, BLOCK: tl.constexpr):
    """Peak; mean of x - peak, standard deviation + 1e-4 and slope over the columns that are not -inf; in one read.

    Tiles are merged by the rule of Chan, Golub and LeVeque, in float64: a few scalars for each tile.
    """
    peak = tl.full([], float("-inf"), acc)
    count = tl.zeros([], tl.float64)
    mean = tl.zeros([], tl.float64)
    squares = tl.zeros([], tl.float64)
    for start in range(0, end, BLOCK):
        x = load_tile(x_ptr, start, end, acc, BLOCK)
        present = x != float("-inf")
        n = tl.sum(present.to(tl.float32), 0).to(tl.float64)
        highest = tl.max(x, 0)
        below = tl.where(present, x - highest, 0.0)  # a NaN stays
        tile_mean = tl.sum(below, 0) / tl.maximum(n, 1.0).to(acc)
        rest = tl.where(present, below - tile_mean, 0.0)
        both = tl.maximum(count + n, 1.0)
        difference = tl.where(n > 0, highest.to(tl.float64) + tile_mean.to(tl.float64) - mean, 0.0)
        mean += difference * n / both
        squares += tl.sum(rest * rest, 0).to(tl.float64) + difference * difference * (count * n / both)
        count += n
        peak = tl.maximum(peak, highest)
    spread = tl.sqrt(squares / tl.maximum(count - 1, 1.0))
    scale = spread + _DEVIATION_OFFSET
    flat = (spread == 0) | (count < 2)
    slope = tl.where(flat, 0.0, 1 / tl.where(flat, 1.0, (count - 1) * spread * scale * scale))
    return peak, (mean - tl.where(count > 0, peak, 0.0)).to(acc), scale.to(acc), slope.to(acc)


@triton.jit
def add_exponentials(x, peak, total, moment, factors):
    """One more tile ``x`` ``[1, BLOCK]`` in the sums of 2^t and of t 2^t ``[R, BLOCK]``, relative to ``peak``.

    ``factors`` ``[R, 1]``. Returns the peak so far and the sums.
    """
    highest = tl.maximum(peak, tl.max(x))  # may miss a NaN; the sums do not
    first = peak == float("-inf")
    fall = tl.where(first, 0.0, peak - highest) * factors
    shrink = tl.where(first, 0.0, tl.exp2(fall))
    t = (x - tl.where(highest == float("-inf"), 0.0, highest)) * factors
    e = tl.exp2(t)
    moment = shrink * (moment + fall * total) + tl.where(e > 0, e * t, e)
    return highest, shrink * total + e, moment


@triton.jit
def _statistics(
    values_ptr,
    index_ptr,
    peak_ptr,
    log_total_ptr,
    expected_ptr,
    mean_ptr,
    scale_ptr,
    slope_ptr,
    slots,
    batch_stride,
    row_stride,
    vocab_size,
    temperature_bits,
    STANDARDIZE: tl.constexpr,
    R: tl.constexpr,
    WIDE_R: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one slot: reads its row once (under STANDARDIZE twice) and writes its scalars; zeros where no row counts.

    R temperatures share the reads. NaN or +inf in a row, or no column but -inf, make ``log_total`` NaN.
    """
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    slot = tl.program_id(0)
    x_ptr, counts = row_of(values_ptr, index_ptr, slot, slots, batch_stride, row_stride)
    end = tl.where(counts, vocab_size, 0)
    peak = tl.full([], float("-inf"), acc)
    mean = tl.zeros([], acc)
    scale = tl.full([], 1.0, acc)
    slope = tl.zeros([], acc)
    if STANDARDIZE:
        peak, mean, scale, slope = deviation(x_ptr, end, acc, BLOCK)
    tl.store(mean_ptr + slot, tl.where(counts, mean, 0.0))  # before the sums, which need the registers
    tl.store(scale_ptr + slot, tl.where(counts, scale, 0.0))
    tl.store(slope_ptr + slot, tl.where(counts, slope, 0.0))
    r = tl.arange(0, WIDE_R)
    factors = tl.full([WIDE_R], 1.0, acc)
    for i in tl.static_range(R):
        factors = tl.where(r == i, exponent_factor(temperature_bits[i], scale, acc), factors)
    total = tl.zeros([WIDE_R, BLOCK], acc)
    moment = tl.zeros([WIDE_R, BLOCK], acc)
    columns = tl.arange(0, BLOCK)[None, :]  # expanded after it is loaded, a tile goes through shared memory
    for start in range(0, end, BLOCK):
        x = load_columns(x_ptr, start + columns, start + BLOCK <= end, end, acc)
        peak, total, moment = add_exponentials(x, peak, total, moment, factors[:, None])
    sums = tl.sum(total, 1)
    sums = tl.where(peak == float("-inf"), float("nan"), sums)
    log_total = tl.log(sums)
    expected = tl.sum(moment, 1) / (sums * factors)
    at = slot + r * tl.num_programs(0)
    tl.store(log_total_ptr + at, tl.where(counts, log_total, 0.0), mask=r < R)
    tl.store(expected_ptr + at, tl.where(counts, expected, 0.0), mask=r < R)
    tl.store(peak_ptr + slot, tl.where(counts, peak, 0.0))


def statistics(
    values: Tensor, index: Tensor, temperatures: Sequence[float], standardize: bool, vocab_size: int
) -> Scalars:
    """The scalars of every slot, at R temperatures."""
    B, A = index.shape
    R = len(temperatures)
    wide = accumulator(values.dtype)
    # Each its own memory: an operator's outputs must not be views of one tensor.
    peak, mean, scale, slope = (values.new_empty(B, A, dtype=wide) for _ in range(4))
    log_total, expected = (values.new_empty(R, B, A, dtype=wide) for _ in range(2))
    if B * A:
        wide_r = triton.next_power_of_2(R)
        launch = launch_options("rows.statistics", values.device)
        _statistics[(B * A,)](
            values,
            index.contiguous(),
            peak,
            log_total,
            expected,
            mean,
            scale,
            slope,
            A,
            *values.stride()[:2],
            vocab_size,
            tuple(bits_of(temperature) for temperature in temperatures),
            STANDARDIZE=standardize,
            R=R,
            WIDE_R=wide_r,
            DOUBLE=wide == torch.float64,
            **{**launch, "BLOCK": max(256, launch["BLOCK"] // wide_r)},  # R sums for each column
        )
    return Scalars(peak, log_total, expected, mean, scale, slope)


# Log-probabilities at a few columns


@triton.jit
def _gather(
    values_ptr,
    index_ptr,
    column_mask_ptr,
    log_scale_ptr,
    columns_ptr,
    poison_ptr,
    peak_ptr,
    log_total_ptr,
    scale_ptr,
    out_ptr,
    mass_ptr,
    slots,
    batch_stride,
    row_stride,
    vocab_size,
    k,
    temperature_bits,
    EACH_ROW: tl.constexpr,
    R: tl.constexpr,
    DOUBLE: tl.constexpr,
    K: tl.constexpr,
):
    """Owns one slot: its log-probabilities ``[R, k]`` at its columns, and their mass at the first temperature.

    NaN where a column does not exist; -inf where it is not looked at, but in a row with NaN; 0 where no row counts.
    """
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    slot = tl.program_id(0)
    all_slots = tl.num_programs(0)
    x_ptr, counts = row_of(values_ptr, index_ptr, slot, slots, batch_stride, row_stride)
    columns_ptr += (slot if EACH_ROW else slot // slots).to(tl.int64) * k
    end = tl.where(counts, vocab_size, 0)
    peak = tl.load(peak_ptr + slot)
    scale = tl.where(counts, tl.load(scale_ptr + slot), 1.0)
    poison = tl.zeros([], acc)
    if poison_ptr is not None:
        poison = tl.load(poison_ptr + slot // slots).to(acc)
    if log_scale_ptr is not None:
        poison += tl.where(counts, tl.load(log_scale_ptr + slot).to(acc), 0.0)
    mass = tl.zeros([K], acc)
    for start in range(0, k, K):
        at = start + tl.arange(0, K)
        columns = tl.load(columns_ptr + at, mask=at < k, other=-1)
        exists = (columns >= 0) & (columns < vocab_size)
        x = tl.load(x_ptr + columns, mask=exists & (columns < end), other=0).to(acc)
        for r in tl.static_range(R):
            scaled = double_of(temperature_bits[r]).to(acc) * scale
            log_p = (x - peak) / scaled - tl.load(log_total_ptr + r * all_slots + slot) + poison
            if column_mask_ptr is not None:
                looked_at = tl.load(column_mask_ptr + columns, mask=exists, other=1) != 0
                log_p = tl.where(looked_at | (log_p != log_p), log_p, float("-inf"))
            log_p = tl.where(exists, log_p, float("nan"))
            log_p = tl.where(counts, log_p, 0.0)
            tl.store(out_ptr + (r * all_slots + slot).to(tl.int64) * k + at, log_p, mask=at < k)
            if r == 0:
                mass += tl.where(at < k, tl.exp(log_p), 0.0)
    if mass_ptr is not None:
        tl.store(mass_ptr + slot, tl.where(counts, tl.sum(mass, 0), 0.0))


def gather(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    columns: Tensor,
    scalars: Scalars,
    temperatures: Sequence[float],
    vocab_size: int,
    *,
    poison: Tensor | None = None,
    mass: Tensor | None = None,
) -> Tensor:
    """Log-probabilities ``[R, B, A, k]`` at ``columns`` (``[B, k]``, or ``[B, A, k]``); ``mass`` ``[B, A]`` is filled.

    Args:
        poison: ``[B]``, added to all of a sequence's log-probabilities.
    """
    (B, A), k, R = index.shape, columns.shape[-1], len(temperatures)
    out = scalars.log_total.new_empty(R, B, A, k)
    if B * A:
        launch = launch_options("rows.gather", values.device)
        _gather[(B * A,)](
            values,
            index.contiguous(),
            column_mask,
            None if log_scale is None else log_scale.contiguous(),
            columns.contiguous(),
            poison,
            scalars.peak,
            scalars.log_total,
            scalars.scale,
            out,
            mass,
            A,
            *values.stride()[:2],
            vocab_size,
            k,
            tuple(bits_of(temperature) for temperature in temperatures),
            EACH_ROW=columns.dim() == 3,
            R=R,
            DOUBLE=out.dtype == torch.float64,
            **{**launch, "K": min(launch["K"], triton.next_power_of_2(max(k, 1)))},
        )
    return out
