"""A row of logits in order: as keys that are sorted, or as counters of the 65,536 values of their keys' first 16 bits.

A key is an integer that, taken without a sign, is the smaller the larger the logit. A program orders rows in buffers of
its own; what one of its threads has written there another reads behind a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mlot_kernels.triton_rows import load_tile

VALUES = 1 << 16  # of 16-bit keys

_VALUES: tl.constexpr = tl.constexpr(VALUES)
_DIGIT: tl.constexpr = tl.constexpr(16)  # values of a digit of the radix sort


@triton.jit
def key_of(x):
    """int32 (int64 of float64); equal for 0 and -0."""
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    integer: tl.constexpr = tl.int16 if BITS == 16 else (tl.int32 if BITS == 32 else tl.int64)
    bits = x.to(integer, bitcast=True).to(tl.int64 if BITS == 64 else tl.int32)
    bits = tl.where(bits == -(1 << (BITS - 1)), 0, bits)
    return tl.where(bits < 0, bits, bits ^ ((1 << (BITS - 1)) - 1))


@triton.jit
def logit_of(key, ELEMENT: tl.constexpr, acc: tl.constexpr):
    """The logit that ``key_of`` made ``key`` of, which may have lost its sign if the logit has 16 bits."""
    BITS: tl.constexpr = ELEMENT.primitive_bitwidth
    integer: tl.constexpr = tl.int16 if BITS == 16 else (tl.int32 if BITS == 32 else tl.int64)
    signed = key.to(integer).to(tl.int64 if BITS == 64 else tl.int32)
    bits = tl.where(signed < 0, signed, signed ^ ((1 << (BITS - 1)) - 1))
    return bits.to(integer).to(ELEMENT, bitcast=True).to(acc)


@triton.jit
def logit_at(keys_ptr, at, mask, ELEMENT: tl.constexpr, acc: tl.constexpr):
    """The logits of the keys at places ``at``; they mean nothing where ``mask`` is false."""
    return logit_of(tl.load(keys_ptr + at, mask=mask, other=0), ELEMENT, acc)


@triton.jit
def order(
    x_ptr,
    column_mask_ptr,
    end,
    keys_ptr,
    counts_ptr,
    spare_ptr,
    columns_ptr,
    spare_columns_ptr,
    BLOCK: tl.constexpr,
):
    """Brings a row into order; returns how many of its logits are not -inf, and how many keys lead the list of them.

    Without ``counts_ptr`` the list has a key for every column, -inf last, and the columns beside them if asked for.
    With it the list has the first 16 bits of every key, once; each value's counter holds how many logits come before
    those that are smaller.
    """
    BITS: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth
    if counts_ptr is None:
        n = _write_keys(x_ptr, column_mask_ptr, end, keys_ptr, columns_ptr, BLOCK)
        sort(keys_ptr, spare_ptr, columns_ptr, spare_columns_ptr, end, BITS, BLOCK)
        listed = n
    else:
        _count(x_ptr, column_mask_ptr, end, counts_ptr, BLOCK)
        n, listed = _list(counts_ptr, keys_ptr, BLOCK)
    return n, listed


@triton.jit
def load_looked_at(x_ptr, column_mask_ptr, start, end, acc: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of logits, -inf at columns left out."""
    columns = start + tl.arange(0, BLOCK)
    x = load_tile(x_ptr, start, end, acc, BLOCK)
    if column_mask_ptr is not None:
        x = tl.where(tl.load(column_mask_ptr + columns, mask=columns < end, other=0) != 0, x, float("-inf"))
    return x


# By counting


@triton.jit
def _count(x_ptr, column_mask_ptr, end, counts_ptr, BLOCK: tl.constexpr):
    """Counts a row's logits by the first 16 bits of their keys, but for -inf. Sums of integers do not depend on their
    order.
    """
    ELEMENT: tl.constexpr = x_ptr.dtype.element_ty
    for start in range(0, _VALUES, BLOCK):
        tl.store(counts_ptr + start + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.int32))
    tl.debug_barrier()
    for start in range(0, end, BLOCK):
        x = load_looked_at(x_ptr, column_mask_ptr, start, end, tl.float32, BLOCK)
        key = (key_of(x.to(ELEMENT)) >> (ELEMENT.primitive_bitwidth - 16)) & (_VALUES - 1)
        tl.atomic_add(counts_ptr + key, tl.full([BLOCK], 1, tl.int32), mask=x != float("-inf"), sem="relaxed")
    tl.debug_barrier()


@triton.jit
def _list(counts_ptr, keys_ptr, BLOCK: tl.constexpr):
    """Makes counters cumulative, and a list of the keys that occur. Returns all that were counted, and its length."""
    counted = tl.zeros([], tl.int32)
    listed = tl.zeros([], tl.int32)
    for start in range(0, _VALUES, BLOCK):
        key = start + tl.arange(0, BLOCK)
        count = tl.load(counts_ptr + key)
        behind = count * 0 + counted
        here = tl.sum(count, 0)
        if here > 0:
            behind += tl.cumsum(count, 0)
            occurs = (count > 0).to(tl.int32)
            tl.store(keys_ptr + listed + tl.cumsum(occurs, 0) - 1, key.to(keys_ptr.dtype.element_ty), mask=count > 0)
            listed += tl.sum(occurs, 0)
        tl.store(counts_ptr + key, behind)
        counted += here
    tl.debug_barrier()
    return counted, listed


# By sorting


@triton.jit
def _write_keys(x_ptr, column_mask_ptr, end, keys_ptr, columns_ptr, BLOCK: tl.constexpr):
    """A row's keys, and its columns, in their order. Returns how many are not -inf."""
    ELEMENT: tl.constexpr = x_ptr.dtype.element_ty
    acc: tl.constexpr = tl.float64 if ELEMENT.primitive_bitwidth == 64 else tl.float32
    count = tl.zeros([], tl.int32)
    for start in range(0, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = load_looked_at(x_ptr, column_mask_ptr, start, end, acc, BLOCK)
        tl.store(keys_ptr + columns, key_of(x.to(ELEMENT)).to(keys_ptr.dtype.element_ty), mask=columns < end)
        if columns_ptr is not None:
            tl.store(columns_ptr + columns, columns, mask=columns < end)
        count += tl.sum((x != float("-inf")).to(tl.int32), 0)
    return count


@triton.jit
def _ranks_in_tile(digit):
    """How many digits ``[BLOCK]``, 0 to 15, stand before each that are the same; counts take 16 bits, four a word."""
    field = ((digit & 3) * 16).to(tl.int64)
    one = (field * 0 + 1) << field
    rank = digit * 0
    for word in tl.static_range(4):  # one after the other: all at once they do not fit into registers
        own = (digit >> 2) == word
        counts = tl.cumsum(tl.where(own, one, 0), 0) >> field
        rank = tl.where(own, (counts & 0xFFFF).to(tl.int32) - 1, rank)
    return rank


@triton.jit
def sort(keys_ptr, spare_ptr, columns_ptr, spare_columns_ptr, end, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Sorts ``end`` keys, and their columns with them, by digits from the last to the first: stable.

    The number of digits is even, so that they end where they began. Each barrier is before a read of what others wrote.
    """
    wide: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    lane = tl.arange(0, BLOCK)
    source = keys_ptr
    target = spare_ptr
    columns_source = columns_ptr
    columns_target = spare_columns_ptr
    for shift in range(0, BITS, 4):
        tl.debug_barrier()
        before = tl.full([_DIGIT], 0, tl.int32)  # how many keys have smaller digits, or the same one in earlier tiles
        for start in range(0, end, BLOCK):
            key = tl.load(source + start + lane, mask=start + lane < end, other=0).to(wide)
            before += tl.histogram(((key >> shift) & (_DIGIT - 1)).to(tl.int32), _DIGIT, start + lane < end)
        before = tl.cumsum(before, 0) - before
        for start in range(0, end, BLOCK):
            at = start + lane
            key = tl.load(source + at, mask=at < end, other=0)
            digit = ((key.to(wide) >> shift) & (_DIGIT - 1)).to(tl.int32)
            place = tl.gather(before, digit, 0) + _ranks_in_tile(digit)
            tl.store(target + place, key, mask=at < end)
            if columns_ptr is not None:
                tl.store(columns_target + place, tl.load(columns_source + at, mask=at < end, other=0), mask=at < end)
            before += tl.histogram(digit, _DIGIT, at < end)
        source, target = target, source
        if columns_ptr is not None:
            columns_source, columns_target = columns_target, columns_source
    tl.debug_barrier()
