"""float32 rows by counting: in 65,536 bins, which are the upper halves of their keys.

Counts alone give most bins one sign: + where as many ranks are before the bin's as the other row has elements that may
not be below its lower edge, - where the bin's last rank is before as many as are above its upper edge. Such a bin is
closed: a second read of the row adds its probabilities up, and in the list that a walk goes down it is one item, its
lowest possible logit with as many ranks as the bin has. The logits of open bins are items of one rank each. Whoever
looks for a rank in such a list finds it exactly in an open bin; inside a closed one it is the bin's first rank, which
is on the right side of all ranks that meet the bin.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mlot_kernels.ops.sorted_l1.triton_order import VALUES, key_of, load_looked_at, sort
from mlot_kernels.ops.sorted_l1.triton_signs import edge_of, first_bin, log2_p

ITEMS = 1 << 14
"""Room of a list. Where a row has more, both are sorted whole."""

_VALUES: tl.constexpr = tl.constexpr(VALUES)
_ITEMS: tl.constexpr = tl.constexpr(ITEMS)
_OPEN: tl.constexpr = tl.constexpr(0)
_PLUS: tl.constexpr = tl.constexpr(1)
_MINUS: tl.constexpr = tl.constexpr(2)
_TAIL: tl.constexpr = tl.constexpr(3)


@triton.jit
def close_bins(own, other, states_ptr, items_ptr, top_k, BLOCK: tl.constexpr):
    """Writes the state of every bin that occurs, and an item for each closed one. Returns how many items these are, and
    how many the row needs in all.

    ``own`` and ``other`` are counted rows.
    """
    closed_items = tl.zeros([], tl.int32)
    items = tl.zeros([], tl.int32)
    for start in range(0, own.listed, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < own.listed
        bins = tl.load(own.keys + i, mask=here, other=0).to(tl.int32) & (_VALUES - 1)
        first = tl.load(own.counts + bins - 1, mask=here & (bins > 0), other=0)
        last = tl.load(own.counts + bins, mask=here, other=0)
        lowest = log2_p(edge_of(bins, False, tl.float32), own.peak, own.factor, own.log2_weight)
        highest = log2_p(edge_of(bins, True, tl.float32), own.peak, own.factor, own.log2_weight)
        larger = tl.load(other.counts + first_bin(other, highest, False, False) - 1)
        no_smaller = tl.load(other.counts + first_bin(other, lowest, True, True) - 1)
        state = tl.where(first >= no_smaller, _PLUS, tl.where(last <= larger, _MINUS, _OPEN))
        state = tl.where(first >= top_k, _TAIL, tl.where(last > top_k, _OPEN, state))
        tl.store(states_ptr + bins, state.to(tl.int8), mask=here)
        closed = (here & (state != _OPEN)).to(tl.int32)
        place = closed_items + tl.cumsum(closed, 0) - 1
        tl.store(items_ptr + place, (bins << 16) | 0xFFFF, mask=(closed > 0) & (place < _ITEMS))
        closed_items += tl.sum(closed, 0)
        items += tl.sum(tl.where(here, tl.where(state == _OPEN, last - first, 1), 0), 0)
    tl.debug_barrier()
    return closed_items, items


@triton.jit
def read_again(x_ptr, column_mask_ptr, end, peak, factor, states_ptr, items_ptr, items, BLOCK: tl.constexpr):
    """Adds an item for every logit of an open bin to the ``items`` that there are. Returns the sums over closed bins of
    sign p and of sign p (x - peak), without the weight, and those of the tail's bins without a sign.
    """
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    tail_total = tl.zeros([BLOCK], tl.float32)
    tail_moment = tl.zeros([BLOCK], tl.float32)
    for start in range(0, end, BLOCK):
        x = load_looked_at(x_ptr, column_mask_ptr, start, end, tl.float32, BLOCK)
        here = x != float("-inf")
        key = key_of(x)
        state = tl.load(states_ptr + ((key >> 16) & (_VALUES - 1)), mask=here, other=_OPEN).to(tl.int32)
        below = x - peak
        p = tl.where(here, tl.exp2(below * factor), 0.0)
        signed = tl.where(state == _PLUS, p, tl.where(state == _MINUS, -p, 0.0))
        in_tail = tl.where(state == _TAIL, p, 0.0)
        below = tl.where(here, below, 0.0)
        total += signed
        moment += signed * below
        tail_total += in_tail
        tail_moment += in_tail * below
        is_item = (here & (state == _OPEN)).to(tl.int32)
        found = tl.sum(is_item, 0)
        if found > 0:
            place = items + tl.cumsum(is_item, 0) - 1
            tl.store(items_ptr + place, key, mask=(is_item > 0) & (place < _ITEMS))
            items += found
    return tl.sum(total, 0), tl.sum(moment, 0), tl.sum(tail_total, 0), tl.sum(tail_moment, 0)


@triton.jit
def order_items(items_ptr, spare_ptr, items, counts_ptr, states_ptr, ranks_ptr, BLOCK: tl.constexpr):
    """Sorts the items, and writes the first rank of each, and behind the last one how many logits there are."""
    sort(items_ptr, spare_ptr, None, None, items, 32, BLOCK)
    before = tl.zeros([], tl.int32)
    for start in range(0, items, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < items
        bins = (tl.load(items_ptr + i, mask=here, other=0) >> 16) & (_VALUES - 1)
        is_open = tl.load(states_ptr + bins, mask=here, other=_OPEN) == _OPEN
        closed = here & ~is_open
        first = tl.load(counts_ptr + bins - 1, mask=closed & (bins > 0), other=0)
        count = tl.where(closed, tl.load(counts_ptr + bins, mask=closed, other=0) - first, here.to(tl.int32))
        tl.store(ranks_ptr + i, before + tl.cumsum(count, 0) - count, mask=here)
        before += tl.sum(count, 0)
    tl.store(ranks_ptr + items, before)
    tl.debug_barrier()
