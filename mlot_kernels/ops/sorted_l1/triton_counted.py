"""Pairs of long rows of at most 32 bits: both are counted, and float32 ones listed by ``triton_bins``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.logits import Side
from mlot_kernels.ops.sorted_l1.reference import STEPS
from mlot_kernels.ops.sorted_l1.triton_bins import ITEMS, close_bins, order_items, read_again
from mlot_kernels.ops.sorted_l1.triton_order import VALUES, order
from mlot_kernels.ops.sorted_l1.triton_pairs import tail_sign_of, write_no_pair, write_side
from mlot_kernels.ops.sorted_l1.triton_sides import ORDERED, Saved, counters
from mlot_kernels.ops.sorted_l1.triton_signs import Row, weigh
from mlot_kernels.triton_rows import row_of
from mlot_kernels.triton_sides import Given
from mlot_kernels.triton_tiles import launch_options

LEFT: tl.constexpr = tl.constexpr(-2.0)
"""In the place of the student's number of steps: neither row is in order yet."""

_STEPS: tl.constexpr = tl.constexpr(STEPS[0])
_VALUES: tl.constexpr = tl.constexpr(VALUES)
_ITEMS: tl.constexpr = tl.constexpr(ITEMS)


@triton.jit
def _pairs(s, t, slot):
    return (tl.load(s.rows + slot) >= 0) & (tl.load(t.rows + slot) >= 0)


@triton.jit
def _count(s, s_room, t, t_room, first_slot, slots, BLOCK: tl.constexpr):
    """Owns one side's row of one pair: reads it once and counts it, in the pair's counters."""
    pair = tl.program_id(0)
    slot = first_slot + pair
    if _pairs(s, t, slot):
        if tl.program_id(1) == 0:
            _count_row(s, s_room, pair, slot, slots, BLOCK)
        else:
            _count_row(t, t_room, pair, slot, slots, BLOCK)


@triton.jit
def _count_row(side, room, pair, slot, slots, BLOCK: tl.constexpr):
    at = pair.to(tl.int64) * _VALUES
    x_ptr, _counts = row_of(side.x, side.rows, slot, slots, side.batch_stride, side.row_stride)
    _n, listed = order(
        x_ptr, side.column_mask, side.vocab_size, room.bins + at, room.counts + at, None, None, None, BLOCK
    )
    tl.store(room.sizes + 2 * pair, listed)
    tl.store(room.sizes + 2 * pair + 1, 0)


@triton.jit
def _list(s, s_saved, s_room, t, t_saved, t_room, first_slot, slots, top_k, BLOCK: tl.constexpr):
    """Owns one side's row of one pair, where it is float32: closes its bins and lists the rest, in a second read."""
    pair = tl.program_id(0)
    slot = first_slot + pair
    if _pairs(s, t, slot):
        if tl.program_id(1) == 0:
            if s.x.dtype.element_ty.primitive_bitwidth == 32:
                _list_row(s, s_saved, s_room, t, t_saved, t_room, pair, slot, slots, top_k, BLOCK)
        else:
            if t.x.dtype.element_ty.primitive_bitwidth == 32:
                _list_row(t, t_saved, t_room, s, s_saved, s_room, pair, slot, slots, top_k, BLOCK)


@triton.jit
def _list_row(side, saved, room, other, other_saved, other_room, pair, slot, slots, top_k, BLOCK: tl.constexpr):
    at = pair.to(tl.int64) * _VALUES
    items_at = pair.to(tl.int64) * _ITEMS
    peak, factor, log2_weight, weight, _poison = weigh(
        side.log_scale, saved.log_total, saved.peak, saved.scale, slot, side.temperature_bits, tl.float32
    )
    other_peak, other_factor, other_log2_weight, other_weight, _poison = weigh(
        other.log_scale,
        other_saved.log_total,
        other_saved.peak,
        other_saved.scale,
        slot,
        other.temperature_bits,
        tl.float32,
    )
    closed, items = close_bins(
        Row(
            side.x,
            room.bins + at,
            tl.load(room.sizes + 2 * pair),
            room.counts + at,
            None,
            None,
            None,
            peak,
            factor,
            log2_weight,
            weight,
        ),
        Row(
            other.x,
            other_room.bins + at,
            tl.load(other_room.sizes + 2 * pair),
            other_room.counts + at,
            None,
            None,
            None,
            other_peak,
            other_factor,
            other_log2_weight,
            other_weight,
        ),
        room.states + at,
        room.items + items_at,
        top_k,
        BLOCK,
    )
    tl.store(room.sizes + 2 * pair + 1, items)
    if items <= _ITEMS:
        x_ptr, _counts = row_of(side.x, side.rows, slot, slots, side.batch_stride, side.row_stride)
        total, moment, tail_total, tail_moment = read_again(
            x_ptr,
            side.column_mask,
            side.vocab_size,
            peak,
            factor,
            room.states + at,
            room.items + items_at,
            closed,
            BLOCK,
        )
        tl.store(room.sums + 4 * pair, total)
        tl.store(room.sums + 4 * pair + 1, moment)
        tl.store(room.sums + 4 * pair + 2, tail_total)
        tl.store(room.sums + 4 * pair + 3, tail_moment)
        order_items(
            room.items + items_at,
            room.spare + items_at,
            items,
            room.counts + at,
            room.states + at,
            room.ranks + items_at + pair,
            BLOCK,
        )


@triton.jit
def _walk(
    s,
    s_expected_ptr,
    s_saved,
    s_room,
    t,
    t_expected_ptr,
    t_saved,
    t_room,
    first_slot,
    top_k,
    rounds,
    STABLE: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one side of one pair: writes all that is written of it, or, if a list had no room for all items, in the
    place of the student's steps that the pair is left.
    """
    pair = tl.program_id(0)
    slot = first_slot + pair
    is_left = tl.maximum(tl.load(s_room.sizes + 2 * pair + 1), tl.load(t_room.sizes + 2 * pair + 1)) > _ITEMS
    if not _pairs(s, t, slot):
        s_counts = tl.load(s.rows + slot) >= 0
        t_counts = tl.load(t.rows + slot) >= 0
        if tl.program_id(1) == 0:
            write_no_pair(slot, s_counts, t_counts, s_saved)
        else:
            write_no_pair(slot, t_counts, s_counts, t_saved)
    elif is_left:
        if tl.program_id(1) == 0:
            tl.store(s_saved.steps + slot.to(tl.int64) * (2 * _STEPS), LEFT)
    elif tl.program_id(1) == 0:
        _walk_row(
            s, s_expected_ptr, s_saved, s_room, t, t_saved, t_room, pair, slot, top_k, rounds, STABLE, TAIL, BLOCK
        )
    else:
        _walk_row(
            t, t_expected_ptr, t_saved, t_room, s, s_saved, s_room, pair, slot, top_k, rounds, STABLE, TAIL, BLOCK
        )


@triton.jit
def _walk_row(
    side,
    expected_ptr,
    saved,
    room,
    other,
    other_saved,
    other_room,
    pair,
    slot,
    top_k,
    rounds,
    STABLE: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = pair.to(tl.int64) * _VALUES
    items_at = pair.to(tl.int64) * _ITEMS
    if side.x.dtype.element_ty.primitive_bitwidth == 32:
        keys_ptr = room.items + items_at
        listed = tl.load(room.sizes + 2 * pair + 1)
        counts_ptr = None
        ranks_ptr = room.ranks + items_at + pair
        states_ptr = room.states + at
        sums_ptr = room.sums + 4 * pair
    else:
        keys_ptr = room.bins + at
        listed = tl.load(room.sizes + 2 * pair)
        counts_ptr = room.counts + at
        ranks_ptr = None
        states_ptr = None
        sums_ptr = None
    if other.x.dtype.element_ty.primitive_bitwidth == 32:
        other_keys_ptr = other_room.items + items_at
        other_listed = tl.load(other_room.sizes + 2 * pair + 1)
        other_counts_ptr = None
        other_ranks_ptr = other_room.ranks + items_at + pair
        other_states_ptr = other_room.states + at
        other_sums_ptr = other_room.sums + 4 * pair
    else:
        other_keys_ptr = other_room.bins + at
        other_listed = tl.load(other_room.sizes + 2 * pair)
        other_counts_ptr = other_room.counts + at
        other_ranks_ptr = None
        other_states_ptr = None
        other_sums_ptr = None
    peak, factor, log2_weight, weight, poison = weigh(
        side.log_scale, saved.log_total, saved.peak, saved.scale, slot, side.temperature_bits, tl.float32
    )
    other_peak, other_factor, other_log2_weight, other_weight, other_poison = weigh(
        other.log_scale,
        other_saved.log_total,
        other_saved.peak,
        other_saved.scale,
        slot,
        other.temperature_bits,
        tl.float32,
    )
    own_row = Row(
        side.x,
        keys_ptr,
        listed,
        counts_ptr,
        ranks_ptr,
        states_ptr,
        sums_ptr,
        peak,
        factor,
        log2_weight,
        weight,
    )
    other_row = Row(
        other.x,
        other_keys_ptr,
        other_listed,
        other_counts_ptr,
        other_ranks_ptr,
        other_states_ptr,
        other_sums_ptr,
        other_peak,
        other_factor,
        other_log2_weight,
        other_weight,
    )
    tail_sign = tl.zeros([], tl.int32)
    if TAIL:
        tail_sign = tail_sign_of(own_row, other_row, top_k, BLOCK)
    write_side(
        slot,
        own_row,
        other_row,
        expected_ptr,
        saved,
        poison + other_poison,
        top_k,
        tail_sign,
        rounds,
        STABLE,
        BLOCK,
    )


def compare_counted(
    sides: Sequence[Side],
    fields: Sequence[Given],
    expectations: Sequence[Tensor],
    saved: Sequence[Saved],
    top_k: int,
    rounds: int,
    constants: dict[str, Any],
) -> None:
    """Writes ``saved``, for so many pairs at a time as there are counters for."""
    B, A = sides[0].row_index.shape
    pairs, room = counters(sides)
    makes_lists = any(side.values.element_size() == 4 for side in sides)
    count, list_, walk = (
        {**launch_options(f"sorted_l1.{kernel}", sides[0].values.device), **ORDERED}
        if makes_lists or kernel != "list"
        else {}
        for kernel in ("count", "list", "walk")
    )
    for first in range(0, B * A, pairs):
        chunk = min(pairs, B * A - first)
        _count[(chunk, 2)](fields[0], room[0], fields[1], room[1], first, A, **count)
        if makes_lists:
            _list[(chunk, 2)](fields[0], saved[0], room[0], fields[1], saved[1], room[1], first, A, top_k, **list_)
        _walk[(chunk, 2)](
            fields[0],
            expectations[0],
            saved[0],
            room[0],
            fields[1],
            expectations[1],
            saved[1],
            room[1],
            first,
            top_k,
            rounds,
            **constants,
            **walk,
        )
