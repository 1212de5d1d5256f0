"""The gradient of log-probabilities at a few columns of each row, for the Triton kernels of every operator that has it.

Three kernels: one program per row makes of the k columns what the others need, one per tile writes the dense gradient,
one per row writes the k columns anew. The formulas are those of ``logits.py``, in the notation of ``triton_rows``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.checks import accumulator
from mlot_kernels.triton_rows import Scalars, bits_of, double_of, exponent_factor, load_tile, row_of, store_tile
from mlot_kernels.triton_tiles import launch_options


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
        launch = launch_options("gradient.invert", values.device)
        _invert[(index.numel(),)](index.contiguous(), slot_of, index.shape[1], T, **launch)
    return slot_of


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
    each_row, double = columns.dim() == 3, wide == torch.float64
    of_all = triton.next_power_of_2(max(k, 1))
    if B * A:
        launch = launch_options("gradient.coefficients", values.device)
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
            EACH_ROW=each_row,
            R=R,
            DOUBLE=double,
            **{**launch, "K": min(launch["K"], of_all)},
        )
    if out.numel():
        launch = launch_options("gradient.write_dense", values.device)
        _write_dense[(B * T, triton.cdiv(width, launch["BLOCK"]))](
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
            DOUBLE=double,
            **launch,
        )
    if B * A and T:
        launch = launch_options("gradient.correct_kept", values.device)
        K = min(launch["K"], of_all)
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
            EACH_ROW=each_row,
            R=R,
            DOUBLE=double,
            **{**launch, "K": K},
        )
    return out, grad_log_scale
