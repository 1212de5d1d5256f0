"""What the Triton kernels over rows of logits share: a row's statistics, and the gradient of a few of its columns.

The formulas are those of ``logits.py``. With c = log2(e) / (temperature * scale) everything is made of t = (x - peak) c
and 2^t: the difference comes first, for it is exact near the peak. Sums are float32 (float64 for float64 logits), in an
order that depends on a row's length alone.

A row is walked in tiles of ``BLOCK`` columns, whole ones without a mask: a mask on the length splits loads into single
elements unless 16 divides it. One program walks one row; a block as wide as the row would not fit into registers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.checks import accumulator

_LOG2E: tl.constexpr = tl.constexpr(1 / math.log(2))
_DEVIATION_OFFSET: tl.constexpr = tl.constexpr(1e-4)

LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}  # fusion is stated: Triton's default changes in 3.10
BLOCK = 4096


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
    columns = start + tl.arange(0, BLOCK)
    if start + BLOCK <= end:
        x = tl.load(x_ptr + columns)
    else:
        x = tl.load(x_ptr + columns, mask=columns < end, other=float("-inf"))
    return x.to(acc)


@triton.jit
def row_of(values_ptr, index_ptr, slot, slots, batch_stride, row_stride):
    """The row that ``slot`` names, and whether it counts. A row may start beyond 2**31 elements."""
    position = tl.load(index_ptr + slot)
    sequence = (slot // slots).to(tl.int64)
    return values_ptr + sequence * batch_stride + tl.maximum(position, 0) * row_stride, position >= 0


@triton.jit
def double_of(bits):
    """The float64 whose bits these are: Triton passes a Python float as float32."""
    return bits.to(tl.float64, bitcast=True)


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
    """One more tile ``x`` ``[BLOCK]`` in the sums of 2^t and of t 2^t ``[R, BLOCK]``, which are relative to ``peak``.

    ``factors`` ``[R, 1]``. Returns the peak so far and the sums.
    """
    highest = tl.maximum(peak, tl.max(x, 0))  # may miss a NaN; the sums do not
    first = peak == float("-inf")
    fall = tl.where(first, 0.0, peak - highest) * factors
    shrink = tl.where(first, 0.0, tl.exp2(fall))
    t = (x - tl.where(highest == float("-inf"), 0.0, highest))[None, :] * factors
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
    r = tl.arange(0, WIDE_R)
    factors = tl.full([WIDE_R], 1.0, acc)
    for i in tl.static_range(R):
        factors = tl.where(r == i, exponent_factor(temperature_bits[i], scale, acc), factors)
    total = tl.zeros([WIDE_R, BLOCK], acc)
    moment = tl.zeros([WIDE_R, BLOCK], acc)
    for start in range(0, end, BLOCK):
        x = load_tile(x_ptr, start, end, acc, BLOCK)
        peak, total, moment = add_exponentials(x, peak, total, moment, factors[:, None])
    sums = tl.sum(total, 1)
    sums = tl.where(peak == float("-inf"), float("nan"), sums)
    log_total = tl.log(sums)
    expected = tl.sum(moment, 1) / (sums * factors)
    at = slot + r * tl.num_programs(0)
    tl.store(log_total_ptr + at, tl.where(counts, log_total, 0.0), mask=r < R)
    tl.store(expected_ptr + at, tl.where(counts, expected, 0.0), mask=r < R)
    tl.store(peak_ptr + slot, tl.where(counts, peak, 0.0))
    tl.store(mean_ptr + slot, tl.where(counts, mean, 0.0))
    tl.store(scale_ptr + slot, tl.where(counts, scale, 0.0))
    tl.store(slope_ptr + slot, tl.where(counts, slope, 0.0))


def statistics(
    values: Tensor, index: Tensor, temperatures: Sequence[float], standardize: bool, vocab_size: int
) -> Scalars:
    """The scalars of every slot, at R temperatures."""
    B, A = index.shape
    R = len(temperatures)
    wide = accumulator(values.dtype)
    peak, mean, scale, slope = values.new_empty(4, B, A, dtype=wide).unbind()
    log_total, expected = values.new_empty(2, R, B, A, dtype=wide).unbind()
    if B * A:
        wide_r = triton.next_power_of_2(R)
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
            BLOCK=max(256, BLOCK // wide_r),
            **LAUNCH,
        )
    return Scalars(peak, log_total, expected, mean, scale, slope)


# The gradient


@triton.jit
def _invert(index_ptr, slot_of_ptr, slots, positions):
    """Writes its slot where the slot's row stands in ``[B, T]``."""
    slot = tl.program_id(0)
    position = tl.load(index_ptr + slot)
    tl.store(slot_of_ptr + (slot // slots).to(tl.int64) * positions + position, slot, mask=position >= 0)


def slots_of_positions(values: Tensor, index: Tensor) -> Tensor:
    """``[B, T]`` int32: the slot in the flat ``[B, A]`` that counts each row, -1 where none does."""
    B, T = values.shape[:2]
    slot_of = index.new_full((B, T), -1, dtype=torch.int32)
    if index.numel() and T:
        _invert[(index.numel(),)](index.contiguous(), slot_of, index.shape[1], T, num_warps=1, enable_fp_fusion=True)
    return slot_of


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
def passed_on(columns_ptr, column_mask_ptr, at, k, vocab_size):
    """The columns ``[K]`` at places ``at`` of k, and whether they exist and are looked at."""
    columns = tl.load(columns_ptr + at, mask=at < k, other=-1)
    passes = (columns >= 0) & (columns < vocab_size)
    if column_mask_ptr is not None:
        passes &= tl.load(column_mask_ptr + columns, mask=passes, other=0) != 0
    return columns, passes


@triton.jit
def upstream(grad_ptr, kept_ptr, grad_mass, base, at, passes, FIRST: tl.constexpr, acc: tl.constexpr):
    """dl/dlog p ``[K]`` at one temperature; at the first one with what the kept mass passes on."""
    H = tl.load(grad_ptr + base + at, mask=passes, other=0).to(acc)
    if FIRST and kept_ptr is not None:
        kept = tl.load(kept_ptr + base + at, mask=passes, other=float("-inf")).to(acc)
        H += tl.where(passes, grad_mass * tl.exp(kept), 0.0)
    return H


@triton.jit
def _coefficients(
    grad_ptr,
    kept_ptr,
    grad_mass_ptr,
    grad_lse_ptr,
    values_ptr,
    index_ptr,
    column_mask_ptr,
    columns_ptr,
    peak_ptr,
    log_total_ptr,
    expected_ptr,
    scale_ptr,
    slope_ptr,
    weight_ptr,
    through_ptr,
    grad_log_scale_ptr,
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
    """Owns one slot: reads its k upstream gradients and logits, writes what the dense gradient needs of them.

    ``weight`` ``[R, B, A]`` stands before 2^t in dl/dx, ``through`` ``[B, A]`` before x - peak - mean.
    """
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    slot = tl.program_id(0)
    all_slots = tl.num_programs(0)
    x_ptr, counts = row_of(values_ptr, index_ptr, slot, slots, batch_stride, row_stride)
    columns_ptr += (slot if EACH_ROW else slot // slots).to(tl.int64) * k
    end = tl.where(counts, vocab_size, 0)
    peak = tl.load(peak_ptr + slot)
    scale = tl.where(counts, tl.load(scale_ptr + slot), 1.0)
    grad_mass = tl.zeros([], acc)
    if grad_mass_ptr is not None:
        grad_mass = tl.load(grad_mass_ptr + slot).to(acc)
    sum_of_all = tl.zeros([], acc)
    deviation_part = tl.zeros([], acc)
    for r in tl.static_range(R):
        total = tl.zeros([], acc)
        moment = tl.zeros([], acc)
        absent = tl.zeros([], acc)
        base = (r * all_slots + slot).to(tl.int64) * k
        for start in range(0, k, K):
            at = start + tl.arange(0, K)
            columns, passes = passed_on(columns_ptr, column_mask_ptr, at, k, end)
            H = upstream(grad_ptr, kept_ptr, grad_mass, base, at, passes, r == 0, acc)
            below = tl.load(x_ptr + columns, mask=passes, other=0).to(acc) - peak
            gone = below == float("-inf")
            total += tl.sum(H, 0)
            moment += tl.sum(tl.where(passes & ~gone, H * below, 0.0), 0)
            absent += tl.sum(tl.where(gone, H, 0.0), 0)
        lse = tl.zeros([], acc)
        if r == 0 and grad_lse_ptr is not None:
            lse = tl.where(counts, tl.load(grad_lse_ptr + slot).to(acc), 0.0)
        temperature = double_of(temperature_bits[r]).to(acc)
        log_total = tl.load(log_total_ptr + r * all_slots + slot)
        W = moment - (total - lse) * tl.load(expected_ptr + r * all_slots + slot) + peak * (lse - absent)
        deviation_part += W / temperature
        sum_of_all += total
        tl.store(weight_ptr + r * all_slots + slot, (lse - total) * tl.exp(-log_total) / (temperature * scale))
    slope = tl.load(slope_ptr + slot)
    tl.store(through_ptr + slot, tl.where(slope == 0, 0.0, -slope * deviation_part))
    tl.store(grad_log_scale_ptr + slot, tl.where(counts, sum_of_all, 0.0))


@triton.jit
def dense(x, slot, all_slots, peak, scale, mean, weight_ptr, through_ptr, temperature_bits, R: tl.constexpr):
    """dl/dx at logits ``x`` before what the kept columns get beside it; 0 at -inf."""
    below = x - peak
    dx = (below - mean) * tl.load(through_ptr + slot)
    for r in tl.static_range(R):
        factor = exponent_factor(temperature_bits[r], scale, x.dtype)
        dx += tl.exp2(below * factor) * tl.load(weight_ptr + r * all_slots + slot)
    return tl.where(below == float("-inf"), 0.0, dx)


@triton.jit
def _write_dense(
    values_ptr,
    slot_of_ptr,
    peak_ptr,
    mean_ptr,
    scale_ptr,
    weight_ptr,
    through_ptr,
    out_ptr,
    positions,
    all_slots,
    batch_stride,
    row_stride,
    vocab_size,
    width,
    temperature_bits,
    R: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one tile of one row of ``[B, T, width]``: reads its logits once, writes their gradient once.

    Zeros where the row does not count and behind the distribution's columns.
    """
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    place = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    slot = tl.load(slot_of_ptr + place)
    out_ptr += place.to(tl.int64) * width
    if slot < 0:
        store_tile(out_ptr, start, width, tl.zeros([BLOCK], acc), BLOCK)
    else:
        sequence = (place // positions).to(tl.int64)
        x_ptr = values_ptr + sequence * batch_stride + (place % positions).to(tl.int64) * row_stride
        x = load_tile(x_ptr, start, vocab_size, acc, BLOCK)
        peak = tl.load(peak_ptr + slot)
        scale = tl.load(scale_ptr + slot)
        mean = tl.load(mean_ptr + slot)
        dx = dense(x, slot, all_slots, peak, scale, mean, weight_ptr, through_ptr, temperature_bits, R)
        if start + BLOCK > vocab_size:
            dx = tl.where(start + tl.arange(0, BLOCK) < vocab_size, dx, 0.0)  # a NaN row's, too
        store_tile(out_ptr, start, width, dx, BLOCK)


@triton.jit
def _correct_kept(
    grad_ptr,
    kept_ptr,
    grad_mass_ptr,
    values_ptr,
    index_ptr,
    column_mask_ptr,
    columns_ptr,
    peak_ptr,
    mean_ptr,
    scale_ptr,
    weight_ptr,
    through_ptr,
    out_ptr,
    slots,
    positions,
    batch_stride,
    row_stride,
    vocab_size,
    width,
    k,
    temperature_bits,
    EACH_ROW: tl.constexpr,
    R: tl.constexpr,
    DOUBLE: tl.constexpr,
    K: tl.constexpr,
):
    """Owns K of one slot's kept columns: writes their gradient anew, from the logits and not from what was rounded.

    A column that stands several times among the k gets the sum of its gradients, added in their order, every time.
    """
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    slot = tl.program_id(0)
    all_slots = tl.num_programs(0)
    x_ptr, counts = row_of(values_ptr, index_ptr, slot, slots, batch_stride, row_stride)
    columns_ptr += (slot if EACH_ROW else slot // slots).to(tl.int64) * k
    end = tl.where(counts, vocab_size, 0)
    scale = tl.where(counts, tl.load(scale_ptr + slot), 1.0)
    grad_mass = tl.zeros([], acc)
    if grad_mass_ptr is not None:
        grad_mass = tl.load(grad_mass_ptr + slot).to(acc)
    mine, passes = passed_on(columns_ptr, column_mask_ptr, tl.program_id(1) * K + tl.arange(0, K), k, end)
    own = tl.zeros([K], acc)
    for start in range(0, k, K):
        at = start + tl.arange(0, K)
        others, pass_too = passed_on(columns_ptr, column_mask_ptr, at, k, end)
        H = tl.zeros([K], acc)
        for r in tl.static_range(R):
            base = (r * all_slots + slot).to(tl.int64) * k
            scaled = double_of(temperature_bits[r]).to(acc) * scale
            H += upstream(grad_ptr, kept_ptr, grad_mass, base, at, pass_too, r == 0, acc) / scaled
        own += tl.sum(tl.where(mine[:, None] == others[None, :], H[None, :], 0.0), 1)
    peak = tl.load(peak_ptr + slot)
    mean = tl.load(mean_ptr + slot)
    x = tl.load(x_ptr + mine, mask=passes, other=float("-inf")).to(acc)
    dx = own + dense(x, slot, all_slots, peak, scale, mean, weight_ptr, through_ptr, temperature_bits, R)
    position = tl.maximum(tl.load(index_ptr + slot), 0)
    out_ptr += ((slot // slots).to(tl.int64) * positions + position) * width
    present = passes & (x - peak != float("-inf"))
    tl.store(out_ptr + mine, dx.to(out_ptr.dtype.element_ty), mask=present)


def gradient_at_columns(
    grad_log_p: Tensor,
    kept: Tensor | None,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    columns: Tensor,
    scalars: Scalars,
    temperatures: Sequence[float],
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """dl/dvalues ``[B, T, V]`` and dl/dlog_scale ``[B, A]`` of log-probabilities at a few columns of each row.

    Args:
        grad_log_p: ``[R, B, A, k]``.
        kept, grad_mass: the log-probabilities at the first temperature ``[B, A, k]``, and the gradient ``[B, A]`` of
            the sum of their exp; or None.
        grad_lse: of the log of the normaliser at the first temperature, ``[B, A]``; or None.
        columns: ``[B, k]``, or ``[B, A, k]`` for each row's own; they may repeat.
    """
    (B, T, width), A, R, k = values.shape, index.shape[1], len(temperatures), columns.shape[-1]
    wide = accumulator(values.dtype)
    out = values.new_empty(B, T, width)
    grad_log_scale = values.new_empty(B, A, dtype=wide)
    if out.numel() == 0 and B * A == 0:
        return out, grad_log_scale
    index, columns = index.contiguous(), columns.contiguous()
    weight, through = values.new_empty(R, B, A, dtype=wide), values.new_empty(B, A, dtype=wide)
    grad_log_p = grad_log_p.contiguous()
    strides = values.stride()[:2]
    bits = tuple(bits_of(temperature) for temperature in temperatures)
    K = min(64, triton.next_power_of_2(max(k, 1)))
    shared: dict[str, Any] = {"EACH_ROW": columns.dim() == 3, "K": K, "R": R, "DOUBLE": wide == torch.float64}
    if B * A:
        _coefficients[(B * A,)](
            grad_log_p,
            kept,
            grad_mass,
            grad_lse,
            values,
            index,
            column_mask,
            columns,
            scalars.peak,
            scalars.log_total,
            scalars.expected,
            scalars.scale,
            scalars.slope,
            weight,
            through,
            grad_log_scale,
            A,
            *strides,
            vocab_size,
            k,
            bits,
            **shared,
            num_warps=1,
            enable_fp_fusion=True,
        )
    if out.numel():
        _write_dense[(B * T, triton.cdiv(width, BLOCK))](
            values,
            slots_of_positions(values, index),
            scalars.peak,
            scalars.mean,
            scalars.scale,
            weight,
            through,
            out,
            T,
            B * A,
            *strides,
            vocab_size,
            width,
            bits,
            R=R,
            DOUBLE=wide == torch.float64,
            BLOCK=BLOCK,
            **LAUNCH,
        )
    if B * A and T:
        _correct_kept[(B * A, triton.cdiv(k, K))](
            grad_log_p,
            kept,
            grad_mass,
            values,
            index,
            column_mask,
            columns,
            scalars.peak,
            scalars.mean,
            scalars.scale,
            weight,
            through,
            out,
            A,
            T,
            *strides,
            vocab_size,
            width,
            k,
            bits,
            **shared,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out, grad_log_scale


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
            K=min(1024, triton.next_power_of_2(max(k, 1))),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
