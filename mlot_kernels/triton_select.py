"""The columns of the k largest logits of every row, on a GPU: exact, in the order of a stable descending sort.

The maxima of groups of 64 columns give a threshold: at least k elements are no smaller than the k-th largest of them,
and few but the k largest are. What passes it is collected, as integers that are different for every column and sort as
(logit, column) does, and ``torch.topk`` orders these few. Where ties or a large k make them too many, the k-th largest
logit itself is found, bit by bit, in 32 readings of the row: exact, but slow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.triton_rows import load_tile, row_of
from mlot_kernels.triton_tiles import launch_options

GROUP = 64  # no tile is smaller

_LEAST: tl.constexpr = tl.constexpr(-(2**31))
_MOST: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def order_of(keys, columns):
    """int64 that are different for every column, larger for a larger int32 key and then for a lower column."""
    return keys.to(tl.int64) * 0x100000000 + (0xFFFFFFFF - columns.to(tl.int64))


def columns_of(order: Tensor) -> Tensor:
    """The columns that ``order_of`` was given."""
    return 0xFFFFFFFF - (order & 0xFFFFFFFF)


@triton.jit
def _keys(x_ptr, column_mask_ptr, start, end, BLOCK: tl.constexpr):
    """int32 ``[BLOCK]`` that sort as the logits do; columns that are not looked at, or beyond ``end``, are last."""
    x = load_tile(x_ptr, start, end, tl.float32, BLOCK)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is equal to 0
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    columns = start + tl.arange(0, BLOCK)
    if column_mask_ptr is not None:
        keys = tl.where(tl.load(column_mask_ptr + columns, mask=columns < end, other=0) != 0, keys, _LEAST)
    return tl.where(columns < end, keys, _LEAST)


@triton.jit
def _group_maxima(
    values_ptr,
    index_ptr,
    column_mask_ptr,
    maxima_ptr,
    slots,
    batch_stride,
    row_stride,
    vocab_size,
    groups,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one tile of one row: reads it once, writes the largest key of each of its groups."""
    slot = tl.program_id(0)
    x_ptr, counts = row_of(values_ptr, index_ptr, slot, slots, batch_stride, row_stride)
    if counts:
        keys = _keys(x_ptr, column_mask_ptr, tl.program_id(1) * BLOCK, vocab_size, BLOCK)
        largest = tl.max(tl.reshape(keys, [BLOCK // GROUP, GROUP]), 1)
        group = tl.program_id(1) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        tl.store(maxima_ptr + slot.to(tl.int64) * groups + group, largest, mask=group < groups)


@triton.jit
def _kth_of_maxima(maxima_ptr, groups, k, BLOCK: tl.constexpr):
    """The k-th largest of the maxima, bit by bit from the top; the least number where there are fewer."""
    found = tl.full([], _LEAST, tl.int32)
    for i in range(0, 32):
        bit = tl.full([], 1, tl.int32) << (31 - i)
        trial = ((found ^ _LEAST) | bit) ^ _LEAST  # as an unsigned number it grows
        count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, groups, BLOCK):
            group = start + tl.arange(0, BLOCK)
            maxima = tl.load(maxima_ptr + group, mask=group < groups, other=_LEAST)
            count += (maxima >= trial).to(tl.int32)
        found = tl.where(tl.sum(count, 0) >= k, trial, found)
    return found


@triton.jit
def _kth_of_row(x_ptr, column_mask_ptr, vocab_size, k, BLOCK: tl.constexpr):
    """The k-th largest key of a row."""
    found = tl.full([], _LEAST, tl.int32)
    for i in range(0, 32):
        bit = tl.full([], 1, tl.int32) << (31 - i)
        trial = ((found ^ _LEAST) | bit) ^ _LEAST
        count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab_size, BLOCK):
            count += (_keys(x_ptr, column_mask_ptr, start, vocab_size, BLOCK) >= trial).to(tl.int32)
        found = tl.where(tl.sum(count, 0) >= k, trial, found)
    return found


@triton.jit
def _append(
    x_ptr,
    column_mask_ptr,
    maxima_ptr,
    chosen_ptr,
    vocab_size,
    groups,
    low,
    high,
    taken,
    room,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Appends the keys ``low .. high`` of a row behind the ``taken`` ones, in the columns' order, while there is room.

    Returns how many that makes, also where there was no room. Tiles without a maximum as large as ``low`` are not read.
    """
    for start in range(0, vocab_size, BLOCK):
        group = start // GROUP + tl.arange(0, BLOCK // GROUP)
        maxima = tl.load(maxima_ptr + group, mask=group < groups, other=_LEAST)
        if tl.max(maxima, 0) >= low:
            keys = _keys(x_ptr, column_mask_ptr, start, vocab_size, BLOCK)
            columns = start + tl.arange(0, BLOCK)
            chosen = (keys >= low) & (keys <= high) & (columns < vocab_size)
            number = chosen.to(tl.int32)
            place = taken + tl.cumsum(number, 0) - 1
            tl.store(chosen_ptr + place, order_of(keys, columns), mask=chosen & (place < room))
            taken += tl.sum(number, 0)
    return taken


@triton.jit
def _collect(
    values_ptr,
    index_ptr,
    column_mask_ptr,
    maxima_ptr,
    chosen_ptr,
    taken_ptr,
    slots,
    batch_stride,
    row_stride,
    vocab_size,
    groups,
    k,
    capacity,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one slot: reads its groups' maxima and the tiles that hold one of the largest, writes what may be of the k.

    ``chosen`` ``[B, A, capacity]``; places that stay free hold the least number. ``taken`` ``[B, A]``: how many there
    are, more than ``capacity`` where there was no room for all.
    """
    slot = tl.program_id(0)
    x_ptr, counts = row_of(values_ptr, index_ptr, slot, slots, batch_stride, row_stride)
    maxima_ptr += slot.to(tl.int64) * groups
    chosen_ptr += slot.to(tl.int64) * capacity
    taken = tl.zeros([], tl.int32)
    if counts:
        low = _kth_of_maxima(maxima_ptr, groups, k, BLOCK)
        high = tl.full([], _MOST, tl.int32)
        taken = _append(
            x_ptr,
            column_mask_ptr,
            maxima_ptr,
            chosen_ptr,
            vocab_size,
            groups,
            low,
            high,
            taken,
            capacity,
            GROUP,
            BLOCK,
        )
    tl.store(taken_ptr + slot, taken)
    for start in range(0, capacity, BLOCK):
        place = start + tl.arange(0, BLOCK)
        free = (place >= taken) & (place < capacity)
        tl.store(chosen_ptr + place, tl.full([BLOCK], -(2**63), tl.int64), mask=free)


@triton.jit
def _collect_exactly(
    values_ptr,
    index_ptr,
    column_mask_ptr,
    maxima_ptr,
    chosen_ptr,
    taken_ptr,
    slots,
    batch_stride,
    row_stride,
    vocab_size,
    groups,
    k,
    capacity,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one slot, and does nothing where there was room: else it finds the k-th largest key and writes the k.

    Those above the k-th come first, then as many of its equals as make k; behind them it writes the least number.
    A kernel of its own, since it is rare and would take registers from the other.
    """
    slot = tl.program_id(0)
    if tl.load(taken_ptr + slot) > capacity:
        x_ptr, _ = row_of(values_ptr, index_ptr, slot, slots, batch_stride, row_stride)
        maxima_ptr += slot.to(tl.int64) * groups
        chosen_ptr += slot.to(tl.int64) * capacity
        kth = _kth_of_row(x_ptr, column_mask_ptr, vocab_size, k, BLOCK)
        low = tl.minimum(kth, _MOST - 1) + 1
        high = tl.full([], _MOST, tl.int32)
        taken = tl.zeros([], tl.int32)
        for _ in range(0, 2):
            taken = _append(
                x_ptr,
                column_mask_ptr,
                maxima_ptr,
                chosen_ptr,
                vocab_size,
                groups,
                low,
                high,
                taken,
                k,
                GROUP,
                BLOCK,
            )
            low, high = kth, kth
        for start in range(0, capacity, BLOCK):
            place = start + tl.arange(0, BLOCK)
            free = (place >= k) & (place < capacity)
            tl.store(chosen_ptr + place, tl.full([BLOCK], -(2**63), tl.int64), mask=free)


def largest_columns(values: Tensor, index: Tensor, column_mask: Tensor | None, vocab_size: int, k: int) -> Tensor:
    """The columns ``[B, A, k]`` of each row's k largest logits, lower ones first among equals, left-out ones last.

    Where no row counts they mean nothing. float64 rows are sorted by torch: for gradcheck, not for speed.
    """
    B, A = index.shape
    if values.dtype == torch.float64:
        rows = values.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, values.shape[2]))[..., :vocab_size]
        order = rows.sort(dim=-1, descending=True, stable=True).indices
        if column_mask is not None:
            order = order.gather(2, (~column_mask[order]).to(torch.uint8).argsort(dim=-1, stable=True))
        return order[..., :k].contiguous()
    groups = triton.cdiv(vocab_size, GROUP)
    capacity = min(triton.next_power_of_2(4 * k), triton.next_power_of_2(vocab_size))
    maxima = index.new_empty(B, A, groups, dtype=torch.int32)
    chosen = index.new_empty(B, A, capacity)
    if B * A:
        index = index.contiguous()
        strides = values.stride()[:2]
        launch = launch_options("select.group_maxima", values.device)
        _group_maxima[(B * A, triton.cdiv(vocab_size, launch["BLOCK"]))](
            values, index, column_mask, maxima, A, *strides, vocab_size, groups, GROUP=GROUP, **launch
        )
        taken = index.new_empty(B, A, dtype=torch.int32)
        for kernel, name in ((_collect, "select.collect"), (_collect_exactly, "select.collect_exactly")):
            kernel[(B * A,)](
                values,
                index,
                column_mask,
                maxima,
                chosen,
                taken,
                A,
                *strides,
                vocab_size,
                groups,
                k,
                capacity,
                GROUP=GROUP,
                **launch_options(name, values.device),
            )
    return columns_of(chosen.topk(k).values)
