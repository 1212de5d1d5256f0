"""sorted_l1 on a GPU: a program brings a pair of rows into order, and finds every sign by counting.

Pairs of long rows are counted (``triton_counted``). Others, and those that counts do not tell enough of, are sorted: by
as many programs as the bound on memory has room for, each of which goes over several pairs.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels import triton_rows
from mlot_kernels.logits import Side
from mlot_kernels.ops.sorted_l1.reference import STEPS
from mlot_kernels.ops.sorted_l1.triton_backward import backward
from mlot_kernels.ops.sorted_l1.triton_counted import LEFT, compare_counted
from mlot_kernels.ops.sorted_l1.triton_order import order
from mlot_kernels.ops.sorted_l1.triton_pairs import tail_sign_of, write_no_pair, write_side
from mlot_kernels.ops.sorted_l1.triton_sides import ORDERED, Saved, are_counted, buffers, variant
from mlot_kernels.ops.sorted_l1.triton_signs import Row, weigh
from mlot_kernels.triton_rows import row_of
from mlot_kernels.triton_sides import given
from mlot_kernels.triton_tiles import launch_options

__all__ = ["backward", "forward"]

_STEPS: tl.constexpr = tl.constexpr(STEPS[0])


@triton.jit
def _compare(
    s,
    s_expected_ptr,
    s_saved,
    s_buffers,
    t,
    t_expected_ptr,
    t_saved,
    t_buffers,
    slots,
    all_slots,
    top_k,
    rounds,
    STABLE: tl.constexpr,
    TAIL: tl.constexpr,
    ONLY_LEFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns every so many-th slot, under ONLY_LEFT where ``triton_counted`` left it: reads both rows once, sorts them in
    the program's own buffers, and writes all that is written of the slot.
    """
    s_acc: tl.constexpr = s_saved.total.dtype.element_ty
    t_acc: tl.constexpr = t_saved.total.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    s_keys_ptr = s_buffers.keys + program * s_buffers.width
    t_keys_ptr = t_buffers.keys + program * t_buffers.width
    s_spare_ptr = s_buffers.spare + program * s_buffers.spare_stride
    t_spare_ptr = t_buffers.spare + program * t_buffers.spare_stride
    for turn in range(tl.program_id(0), all_slots, tl.num_programs(0)):
        slot = tl.zeros([], tl.int32) + turn  # a tensor in the interpreter, too
        s_x_ptr, s_counts = row_of(s.x, s.rows, slot, slots, s.batch_stride, s.row_stride)
        t_x_ptr, t_counts = row_of(t.x, t.rows, slot, slots, t.batch_stride, t.row_stride)
        pairs = s_counts & t_counts
        if ONLY_LEFT:
            pairs = pairs & (tl.load(s_saved.steps + slot.to(tl.int64) * (2 * _STEPS)) == LEFT)
        if pairs:
            _s_n, s_listed = order(
                s_x_ptr, s.column_mask, s.vocab_size, s_keys_ptr, None, s_spare_ptr, None, None, BLOCK
            )
            _t_n, t_listed = order(
                t_x_ptr, t.column_mask, t.vocab_size, t_keys_ptr, None, t_spare_ptr, None, None, BLOCK
            )
            s_peak, s_factor, s_log2_weight, s_weight, s_poison = weigh(
                s.log_scale, s_saved.log_total, s_saved.peak, s_saved.scale, slot, s.temperature_bits, s_acc
            )
            t_peak, t_factor, t_log2_weight, t_weight, t_poison = weigh(
                t.log_scale, t_saved.log_total, t_saved.peak, t_saved.scale, slot, t.temperature_bits, t_acc
            )
            s_row = Row(s.x, s_keys_ptr, s_listed, None, None, None, None, s_peak, s_factor, s_log2_weight, s_weight)
            t_row = Row(t.x, t_keys_ptr, t_listed, None, None, None, None, t_peak, t_factor, t_log2_weight, t_weight)
            tail_sign = tl.zeros([], tl.int32)
            if TAIL:
                tail_sign = tail_sign_of(s_row, t_row, top_k, BLOCK)
            poison = s_poison.to(t_acc) + t_poison
            write_side(slot, s_row, t_row, s_expected_ptr, s_saved, poison, top_k, tail_sign, rounds, STABLE, BLOCK)
            write_side(slot, t_row, s_row, t_expected_ptr, t_saved, poison, top_k, -tail_sign, rounds, STABLE, BLOCK)
            tl.debug_barrier()  # before the next rows' keys
        elif not ONLY_LEFT:
            write_no_pair(slot, s_counts, t_counts, s_saved)
            write_no_pair(slot, t_counts, s_counts, t_saved)


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Arguments and outputs as in the schema."""
    sides = Side(*arguments[:7]), Side(*arguments[7:14])
    top_k, rounds, constants = variant(sides, *arguments[14:])
    B, A = sides[0].row_index.shape
    expectations, saved = [], []
    for side in sides:
        peak, log_total, expected, mean, scale, slope = triton_rows.statistics(
            side.values, side.row_index, (side.temperature,), side.standardize, side.vocab_size
        ).without_temperatures()
        total, moment = (peak.new_empty(B, A) for _ in range(2))  # outputs are no views of one tensor
        expectations.append(expected)
        saved.append(Saved(peak, log_total, mean, scale, slope, total, moment, peak.new_empty(B, A, *STEPS)))
    if B * A:
        fields = [given(side) for side in sides]
        counted = are_counted(sides)
        if counted:
            compare_counted(sides, fields, expectations, saved, top_k, rounds, constants)
        if not counted or max(side.values.element_size() for side in sides) == 4:
            programs, room = buffers(sides)
            _compare[(programs,)](
                fields[0],
                expectations[0],
                saved[0],
                room[0],
                fields[1],
                expectations[1],
                saved[1],
                room[1],
                A,
                B * A,
                top_k,
                rounds,
                **constants,
                ONLY_LEFT=counted,
                **launch_options("sorted_l1.compare", arguments[0].device),
                **ORDERED,
            )
    return saved[0].total + saved[1].total, *saved[0], *saved[1]
