"""row_entropy on a GPU: one program walks one row forward, one program writes one tile of one row backward."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels import triton_rows as rows
from mlot_kernels.checks import accumulator
from mlot_kernels.triton_gradient import slots_of_positions
from mlot_kernels.triton_rows import deviation, double_of, exponent_factor, load_tile, row_of, store_tile
from mlot_kernels.triton_tiles import launch_options

_LOG2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def _forward(
    values_ptr,
    index_ptr,
    column_mask_ptr,
    log_scale_ptr,
    entropy_ptr,
    mass_ptr,
    peak_ptr,
    log_total_ptr,
    mean_ptr,
    scale_ptr,
    slope_ptr,
    moment_ptr,
    slots,
    batch_stride,
    row_stride,
    vocab_size,
    temperature_bits,
    STANDARDIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one slot: reads its row once (under STANDARDIZE twice), writes its entropy and what backward needs.

    With t = (x - peak) factor and u = t - center it carries the sums of 2^t, 2^t u and 2^t u^2; a new peak shifts them.
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
    factor = exponent_factor(temperature_bits, scale, acc)
    center = mean * factor
    total = tl.zeros([BLOCK], acc)
    first = tl.zeros([BLOCK], acc)
    kept_total = tl.zeros([BLOCK], acc)
    kept_first = tl.zeros([BLOCK], acc)
    kept_second = tl.zeros([BLOCK], acc)
    for start in range(0, end, BLOCK):
        x = load_tile(x_ptr, start, end, acc, BLOCK)
        highest = tl.maximum(peak, tl.max(x, 0))  # may miss a NaN; the sums do not
        unseen = peak == float("-inf")
        fall = tl.where(unseen, 0.0, peak - highest) * factor
        shrink = tl.where(unseen, 0.0, tl.exp2(fall))
        peak = highest
        u = (x - tl.where(peak == float("-inf"), 0.0, peak)) * factor - center
        e = tl.exp2(u + center)
        eu = tl.where(e > 0, e * u, e)
        euu = tl.where(e > 0, eu * u, e)
        if column_mask_ptr is None:
            kept_second = shrink * (kept_second + fall * (2 * first + fall * total)) + euu
        else:
            columns = start + tl.arange(0, BLOCK)
            keep = tl.load(column_mask_ptr + columns, mask=columns < end, other=0) != 0
            kept_second = shrink * (kept_second + fall * (2 * kept_first + fall * kept_total)) + tl.where(
                keep, euu, 0.0
            )
            kept_first = shrink * (kept_first + fall * kept_total) + tl.where(keep, eu, 0.0)
            kept_total = shrink * kept_total + tl.where(keep, e, 0.0)
        first = shrink * (first + fall * total) + eu
        total = shrink * total + e
    if column_mask_ptr is None:
        kept_total, kept_first = total, first
    all_of_it = tl.sum(total, 0)
    all_of_it = tl.where(peak == float("-inf"), float("nan"), all_of_it)
    S0, S1, S2 = tl.sum(kept_total, 0), tl.sum(kept_first, 0), tl.sum(kept_second, 0)
    log_total = tl.log(all_of_it)
    log_scale = tl.zeros([], acc)
    if log_scale_ptr is not None:
        log_scale = tl.where(counts, tl.load(log_scale_ptr + slot).to(acc), 0.0)
    # On the columns looked at p = 2^t exp(offset), log p = log(2) u + at_center.
    offset = log_scale - log_total
    weight = tl.exp(offset)
    at_center = tl.where(weight == 0, 0.0, offset + _LOG2 * center)
    mass = weight * S0
    entropy = -weight * (S1 * _LOG2 + at_center * S0)
    moment = (mass - entropy) * tl.sum(first, 0) / all_of_it - weight * (S2 * _LOG2 + (at_center + 1) * S1)
    tl.store(entropy_ptr + slot, tl.where(counts, entropy, 0.0))
    tl.store(mass_ptr + slot, tl.where(counts, mass, 0.0))
    tl.store(peak_ptr + slot, tl.where(counts, peak, 0.0))
    tl.store(log_total_ptr + slot, tl.where(counts, log_total, 0.0))
    tl.store(mean_ptr + slot, tl.where(counts, mean, 0.0))
    tl.store(scale_ptr + slot, tl.where(counts, scale, 0.0))
    tl.store(slope_ptr + slot, tl.where(counts, slope, 0.0))
    tl.store(moment_ptr + slot, tl.where(counts, moment / factor, 0.0))


@triton.jit
def _backward(
    grad_ptr,
    values_ptr,
    slot_of_ptr,
    column_mask_ptr,
    log_scale_ptr,
    entropy_ptr,
    mass_ptr,
    peak_ptr,
    log_total_ptr,
    mean_ptr,
    scale_ptr,
    slope_ptr,
    moment_ptr,
    out_ptr,
    positions,
    batch_stride,
    row_stride,
    vocab_size,
    width,
    temperature_bits,
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
        columns = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + slot).to(acc)
        temperature = double_of(temperature_bits).to(acc)
        inverse = 1 / (temperature * tl.load(scale_ptr + slot))
        log_scale = tl.zeros([], acc)
        if log_scale_ptr is not None:
            log_scale = tl.load(log_scale_ptr + slot).to(acc)
        p_over_q = tl.exp(log_scale)
        more = tl.where(p_over_q == 0, 0.0, log_scale + 1)  # p = 0 there: not 0 * -inf
        through = tl.load(slope_ptr + slot) * grad * tl.load(moment_ptr + slot) / temperature

        below = x - tl.load(peak_ptr + slot)
        log_q = below * inverse - tl.load(log_total_ptr + slot)
        q = tl.exp(log_q)
        of_p = tl.where(q == 0, 0.0, p_over_q * (log_q + more))
        if column_mask_ptr is not None:
            of_p = tl.where(tl.load(column_mask_ptr + columns, mask=columns < vocab_size, other=0) != 0, of_p, 0.0)
        rest = tl.load(mass_ptr + slot) - tl.load(entropy_ptr + slot)
        dx = q * (grad * inverse) * (rest - of_p)
        if through != 0:
            dx -= (below - tl.load(mean_ptr + slot)) * through
        dx = tl.where((below == float("-inf")) | (columns >= vocab_size), 0.0, dx)
        store_tile(out_ptr, start, width, dx, BLOCK)


def forward(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    temperature: float,
    standardize: bool,
    vocab_size: int,
) -> tuple[Tensor, ...]:
    B, A = index.shape
    wide = accumulator(values.dtype)
    outputs = tuple(values.new_empty(B, A, dtype=wide) for _ in range(8))
    if B * A:
        _forward[(B * A,)](
            values,
            index.contiguous(),
            column_mask,
            None if log_scale is None else log_scale.contiguous(),
            *outputs,
            A,
            *values.stride()[:2],
            vocab_size,
            rows.bits_of(temperature),
            STANDARDIZE=standardize,
            DOUBLE=wide == torch.float64,
            **launch_options("row_entropy.forward", values.device),
        )
    return outputs


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
    B, T, width = values.shape
    out = values.new_empty(B, T, width)
    if out.numel():
        launch = launch_options("row_entropy.backward", values.device)
        _backward[(B * T, triton.cdiv(width, launch["BLOCK"]))](
            grad.contiguous(),
            values,
            slots_of_positions(values, index),
            column_mask,
            None if log_scale is None else log_scale.contiguous(),
            entropy,
            mass,
            peak,
            log_total,
            mean,
            scale,
            slope,
            moment,
            out,
            T,
            *values.stride()[:2],
            vocab_size,
            width,
            rows.bits_of(temperature),
            DOUBLE=entropy.dtype == torch.float64,
            **launch,
        )
    return out, grad * (entropy - mass)
