"""The gradient of sorted_l1: one program writes one tile of one row by the steps that forward left. Where it left none,
because a row's signs change too often, one that orders both rows anew writes the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.checks import accumulator
from mlot_kernels.logits import Side
from mlot_kernels.ops.sorted_l1.reference import STEPS
from mlot_kernels.ops.sorted_l1.triton_order import order
from mlot_kernels.ops.sorted_l1.triton_sides import ORDERED, Saved, are_counted, buffers, variant
from mlot_kernels.ops.sorted_l1.triton_signs import Row, log2_p, mean_of, run_of, signs, sum_from, weigh
from mlot_kernels.triton_gradient import slots_of_positions
from mlot_kernels.triton_rows import double_of, exponent_factor, load_tile, row_of, store_tile
from mlot_kernels.triton_sides import given
from mlot_kernels.triton_tiles import launch_options

_STEPS: tl.constexpr = tl.constexpr(STEPS[0])


@triton.jit
def _gradient_of(x, sign, slot, grad_ptr, side, saved, acc: tl.constexpr):
    """dl/dx ``[BLOCK]`` from the signs of columns that are looked at, and 0 for the others; 0 at -inf."""
    grad = tl.load(grad_ptr + slot).to(acc)
    scale = tl.load(saved.scale + slot)
    temperature = double_of(side.temperature_bits).to(acc)
    scale_of_p = tl.full([], 1.0, acc)
    if side.log_scale is not None:
        scale_of_p = tl.exp(tl.load(side.log_scale + slot).to(acc))
    weight = grad * tl.exp(-tl.load(saved.log_total + slot)) / (temperature * scale)
    through = tl.load(saved.slope + slot) * grad * tl.load(saved.moment + slot) / temperature
    below = x - tl.load(saved.peak + slot)
    e = tl.exp2(below * exponent_factor(side.temperature_bits, scale, acc))
    dx = e * (weight * (sign * scale_of_p - tl.load(saved.total + slot)))
    dx -= (below - tl.load(saved.mean + slot)) * through
    return tl.where(below == float("-inf"), 0.0, dx)


@triton.jit
def _backward(
    grad_ptr,
    side,
    saved,
    slot_of_ptr,
    other_index_ptr,
    out_ptr,
    positions,
    width,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one tile of one row of ``[B, T, width]``: reads its logits once, writes their gradient once.

    A logit's sign is that of the last step whose threshold it is below. Zeros where no pair counts, and behind the
    distribution's columns. Where forward left no steps it writes nothing that stays: ``_order_again`` follows.
    """
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    place = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    slot = tl.load(slot_of_ptr + place)
    out_ptr += place.to(tl.int64) * width
    pairs = slot >= 0
    if pairs:
        pairs = tl.load(other_index_ptr + slot) >= 0
    if pairs:
        sequence = (place // positions).to(tl.int64)
        x_ptr = side.x + sequence * side.batch_stride + (place % positions).to(tl.int64) * side.row_stride
        x = load_tile(x_ptr, start, side.vocab_size, acc, BLOCK)
        columns = start + tl.arange(0, BLOCK)
        steps_ptr = saved.steps + slot.to(tl.int64) * (2 * _STEPS)
        sign = tl.zeros([BLOCK], acc) + tl.load(steps_ptr + 1)
        for step in range(1, tl.load(steps_ptr).to(tl.int32)):
            sign = tl.where(x < tl.load(steps_ptr + 2 * step), tl.load(steps_ptr + 2 * step + 1), sign)
        if side.column_mask is not None:
            looked_at = tl.load(side.column_mask + columns, mask=columns < side.vocab_size, other=0) != 0
            sign = tl.where(looked_at, sign, 0.0)
        dx = _gradient_of(x, sign, slot, grad_ptr, side, saved, acc)
        store_tile(out_ptr, start, width, tl.where(columns < side.vocab_size, dx, 0.0), BLOCK)
    else:
        store_tile(out_ptr, start, width, tl.zeros([BLOCK], acc), BLOCK)


@triton.jit
def _order_again(
    grad_ptr,
    side,
    saved,
    buffers,
    other,
    other_saved,
    other_buffers,
    out_ptr,
    slots,
    all_slots,
    positions,
    width,
    top_k,
    rounds,
    STABLE: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns every so many-th slot: where forward left no steps, it orders both rows anew and writes one's gradient.

    Under STABLE the columns are sorted along, and every rank's gradient goes to its column; else the ranks of every
    column's logit are looked up.
    """
    OWN: tl.constexpr = side.x.dtype.element_ty
    OTHER: tl.constexpr = other.x.dtype.element_ty
    acc: tl.constexpr = tl.float64 if OWN.primitive_bitwidth == 64 else tl.float32
    other_acc: tl.constexpr = tl.float64 if OTHER.primitive_bitwidth == 64 else tl.float32
    wide: tl.constexpr = tl.float64 if OTHER.primitive_bitwidth == 64 else acc
    program = tl.program_id(0).to(tl.int64)
    keys_ptr = buffers.keys + program * buffers.width
    counts_ptr = buffers.counts
    spare_ptr = buffers.spare
    columns_ptr = buffers.columns
    spare_columns_ptr = buffers.spare_columns
    other_keys_ptr = other_buffers.keys + program * other_buffers.width
    other_counts_ptr = other_buffers.counts
    other_spare_ptr = other_buffers.spare
    if counts_ptr is not None:
        counts_ptr += program * buffers.width
    else:
        spare_ptr += program * buffers.spare_stride
    if other_counts_ptr is not None:
        other_counts_ptr += program * other_buffers.width
    else:
        other_spare_ptr += program * other_buffers.spare_stride
    if STABLE:
        columns_ptr += program * buffers.width
        spare_columns_ptr += program * buffers.width
    for turn in range(tl.program_id(0), all_slots, tl.num_programs(0)):
        slot = tl.zeros([], tl.int32) + turn  # a tensor in the interpreter, too
        x_ptr, counts = row_of(side.x, side.rows, slot, slots, side.batch_stride, side.row_stride)
        other_x_ptr, other_counts = row_of(other.x, other.rows, slot, slots, other.batch_stride, other.row_stride)
        if counts & other_counts & (tl.load(saved.steps + slot.to(tl.int64) * (2 * _STEPS)) < 0):
            _n, listed = order(
                x_ptr,
                side.column_mask,
                side.vocab_size,
                keys_ptr,
                counts_ptr,
                spare_ptr,
                columns_ptr,
                spare_columns_ptr,
                BLOCK,
            )
            _other_n, other_listed = order(
                other_x_ptr,
                other.column_mask,
                other.vocab_size,
                other_keys_ptr,
                other_counts_ptr,
                other_spare_ptr,
                None,
                None,
                BLOCK,
            )
            peak, factor, log2_weight, weight, _ = weigh(
                side.log_scale, saved.log_total, saved.peak, saved.scale, slot, side.temperature_bits, acc
            )
            other_peak, other_factor, other_log2_weight, other_weight, _ = weigh(
                other.log_scale,
                other_saved.log_total,
                other_saved.peak,
                other_saved.scale,
                slot,
                other.temperature_bits,
                other_acc,
            )
            own_row = Row(side.x, keys_ptr, listed, counts_ptr, None, None, None, peak, factor, log2_weight, weight)
            other_row = Row(
                other.x,
                other_keys_ptr,
                other_listed,
                other_counts_ptr,
                None,
                None,
                None,
                other_peak,
                other_factor,
                other_log2_weight,
                other_weight,
            )
            tail_sign = tl.zeros([], tl.int32)
            if TAIL:
                tail, other_tail = sum_from(own_row, top_k, BLOCK), sum_from(other_row, top_k, BLOCK)
                tail_sign = (tail > other_tail).to(tl.int32) - (tail < other_tail).to(tl.int32)
            position = tl.load(side.rows + slot)
            row_ptr = out_ptr + ((slot // slots).to(tl.int64) * positions + position) * width
            for start in range(0, side.vocab_size, BLOCK):
                i = start + tl.arange(0, BLOCK)
                here = i < side.vocab_size
                columns = i
                if STABLE:
                    columns = tl.load(columns_ptr + i, mask=here, other=0)
                x = tl.load(x_ptr + columns, mask=here, other=float("-inf")).to(acc)
                looked_at = here & (x != float("-inf"))
                if side.column_mask is not None:
                    looked_at &= tl.load(side.column_mask + columns, mask=here, other=0) != 0
                first = i
                last = i + 1
                if not STABLE:
                    first, last = run_of(own_row, x, looked_at, rounds)
                    first = tl.where(looked_at, first, i)
                    last = tl.where(looked_at, last, i + 1)
                t = log2_p(x, peak, factor, log2_weight).to(wide)
                sum_of_signs, _signed = signs(first, last, t, looked_at, other_row, top_k, tail_sign, rounds)
                sign = tl.where(looked_at, mean_of(sum_of_signs, last - first, acc), 0.0)
                dx = _gradient_of(x, sign, slot, grad_ptr, side, saved, acc)
                tl.store(row_ptr + columns, dx.to(row_ptr.dtype.element_ty), mask=here)
            tl.debug_barrier()  # before the next rows' keys


def backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Arguments and outputs as in the schema; a side that is not needed is empty."""
    sides = Side(*arguments[:7]), Side(*arguments[7:14])
    saved, needed = (Saved(*arguments[17:25]), Saved(*arguments[25:33])), arguments[33:]
    gradients: list[Tensor] = []
    for i, side in enumerate(sides):
        if needed[i]:
            gradients += _gradient(grad, (side, sides[1 - i]), (saved[i], saved[1 - i]), *arguments[14:17])
        else:
            gradients += [side.values.new_empty(0), grad.new_empty(0, dtype=accumulator(side.values.dtype))]
    return tuple(gradients)


def _gradient(
    grad: Tensor, sides: Sequence[Side], saved: Sequence[Saved], ties: str, top_k: int, tail: str
) -> list[Tensor]:
    """The gradient of ``sides[0]``."""
    side, other = sides
    total = saved[0].total
    (B, T, width), A = side.values.shape, side.row_index.shape[1]
    out = side.values.new_empty(B, T, width)
    unpaired = (side.row_index < 0) | (other.row_index < 0)
    grad_log_scale = (grad.to(total.dtype) * total).masked_fill(unpaired, 0)
    if out.numel() == 0:
        return [out, grad_log_scale]
    own, others = given(side), given(other)
    launch = launch_options("sorted_l1.backward", grad.device)
    _backward[(B * T, triton.cdiv(width, launch["BLOCK"]))](
        grad,
        own,
        saved[0],
        slots_of_positions(side.values, side.row_index),
        others.rows,
        out,
        T,
        width,
        DOUBLE=total.dtype == torch.float64,
        **launch,
    )
    if B * A:
        most, rounds, constants = variant(sides, ties, top_k, tail)
        programs, room = buffers(sides, are_counted(sides), side if constants["STABLE"] else None)
        _order_again[(programs,)](
            grad,
            own,
            saved[0],
            room[0],
            others,
            saved[1],
            room[1],
            out,
            A,
            B * A,
            T,
            width,
            most,
            rounds,
            **constants,
            **launch_options("sorted_l1.order_again", grad.device),
            **ORDERED,
        )
    return [out, grad_log_scale]
