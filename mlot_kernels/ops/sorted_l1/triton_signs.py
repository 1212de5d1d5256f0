"""Signs of ranks, found by counting: what a program knows of two rows that are in order, and its walk down one of them.

The sign of p at rank i needs two numbers of the other row: how many of its probabilities are larger, and how many are
no smaller. A run of equal logits needs the same of its own row, and has then the mean of its signs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from mlot_kernels.ops.sorted_l1.reference import STEPS
from mlot_kernels.ops.sorted_l1.triton_order import VALUES, key_of, logit_at, logit_of
from mlot_kernels.triton_rows import exponent_factor

LOG2E: tl.constexpr = tl.constexpr(1 / math.log(2))

_STEPS: tl.constexpr = tl.constexpr(STEPS[0])
_VALUES: tl.constexpr = tl.constexpr(VALUES)


class Row(NamedTuple):
    """A row in order, p = 2^((x - peak) factor) weight."""

    x: Any  # where its logits are, for their type
    keys: Any  # the list of ``triton_order.order``, or of ``triton_bins``
    listed: Any  # its length, without -inf
    counts: Any  # of a row that is counted, else None
    ranks: Any  # of a list of ``triton_bins``: each item's first rank, one more than there are items; else None
    states: Any  # with ``ranks``: of each bin, 0 where it is open
    sums: Any  # with ``ranks``: the four of ``triton_bins.read_again``
    peak: Any
    factor: Any
    log2_weight: Any
    weight: Any


@triton.jit
def weigh(log_scale_ptr, log_total_ptr, peak_ptr, scale_ptr, slot, temperature_bits, acc: tl.constexpr):
    """The last four fields of a ``Row``, and 0 or NaN for all of the pair."""
    offset = -tl.load(log_total_ptr + slot)
    if log_scale_ptr is not None:
        offset += tl.load(log_scale_ptr + slot).to(acc)
    weight = tl.exp(offset)
    poison = 0.0 * (tl.load(log_total_ptr + slot) + weight)
    factor = exponent_factor(temperature_bits, tl.load(scale_ptr + slot), acc)
    return tl.load(peak_ptr + slot), factor, offset * LOG2E, weight, poison


# Ranks


@triton.jit
def log2_p(x, peak, factor, log2_weight):
    """log2 p, rounded alike wherever it stands: equal probabilities must be found equal."""
    return tl.fma(x - peak, factor, log2_weight)


@triton.jit
def _rank_in_list(
    keys_ptr,
    low,
    n,
    peak,
    factor,
    log2_weight,
    t,
    rounds,
    EQUAL: tl.constexpr,
    ELEMENT: tl.constexpr,
    acc: tl.constexpr,
):
    """How many of a list's ``n`` logits have a log2 p above ``t`` ``[BLOCK]``, or ``EQUAL``; at least ``low``."""
    high = low * 0 + n
    for _ in range(0, rounds):
        middle = (low + high) >> 1
        unknown = low < high
        x = logit_at(keys_ptr, middle, unknown, ELEMENT, acc)
        own = log2_p(x, peak, factor, log2_weight).to(t.dtype)
        is_before = (own >= t) if EQUAL else (own > t)
        low = tl.where(unknown & is_before, middle + 1, low)
        high = tl.where(unknown & ~is_before, middle, high)
    return low


@triton.jit
def edge_of(bins, HIGHEST: tl.constexpr, ELEMENT: tl.constexpr):
    """The highest or the lowest logit whose key begins with these 16 bits."""
    if ELEMENT.primitive_bitwidth == 16:
        key = bins
    else:
        key = (bins << 16) | (0 if HIGHEST else 0xFFFF)
    return logit_of(key, ELEMENT, tl.float32)


@triton.jit
def first_bin(row, t, EQUAL: tl.constexpr, HIGHEST: tl.constexpr):
    """The first bin of those of finite logits, or the one behind them, whose edge's log2 p is not above ``t``
    ``[BLOCK]``, nor ``EQUAL``.

    Nothing is read: the edge is made of the bin.
    """
    ELEMENT: tl.constexpr = row.x.dtype.element_ty
    INFINITY: tl.constexpr = 0x7C00 if ELEMENT.is_fp16() else 0x7F80
    low = tl.zeros_like(t).to(tl.int32) + ((INFINITY ^ 0x7FFF) + 1)
    high = low * 0 + (INFINITY | 0x8000)
    for _ in range(0, 16):
        middle = (low + high) >> 1
        unknown = low < high
        edge = log2_p(edge_of(middle, HIGHEST, ELEMENT), row.peak, row.factor, row.log2_weight).to(t.dtype)
        is_before = (edge >= t) if EQUAL else (edge > t)
        low = tl.where(unknown & is_before, middle + 1, low)
        high = tl.where(unknown & ~is_before, middle, high)
    return low


@triton.jit
def _ranks_in(row, t, asked, rounds):
    """How many of a row's elements have a log2 p above ``t`` ``[BLOCK]``, and how many one no smaller."""
    ELEMENT: tl.constexpr = row.x.dtype.element_ty
    acc: tl.constexpr = tl.float64 if ELEMENT.primitive_bitwidth == 64 else tl.float32
    if row.counts is not None:
        bins = first_bin(row, t, False, False)
        larger = tl.load(row.counts + bins - 1)
        no_smaller = larger
        met = log2_p(edge_of(bins, False, ELEMENT), row.peak, row.factor, row.log2_weight)
        if tl.max((asked & (met.to(t.dtype) == t)).to(tl.int32), 0) > 0:
            no_smaller = tl.load(row.counts + first_bin(row, t, True, False) - 1)
    else:
        first = asked.to(tl.int32) * 0
        larger = _rank_in_list(
            row.keys, first, row.listed, row.peak, row.factor, row.log2_weight, t, rounds, False, ELEMENT, acc
        )
        no_smaller = larger
        there = asked & (larger < row.listed)
        met = log2_p(logit_at(row.keys, larger, there, ELEMENT, acc), row.peak, row.factor, row.log2_weight)
        if tl.max((there & (met.to(t.dtype) == t)).to(tl.int32), 0) > 0:
            no_smaller = _rank_in_list(
                row.keys, larger, row.listed, row.peak, row.factor, row.log2_weight, t, rounds, True, ELEMENT, acc
            )
        if row.ranks is not None:
            larger = tl.load(row.ranks + larger)
            no_smaller = tl.load(row.ranks + no_smaller)
    return larger, no_smaller


@triton.jit
def run_of(row, x, here, rounds):
    """The first rank of the logits equal to ``x`` ``[BLOCK]``, and the one behind their last."""
    ELEMENT: tl.constexpr = row.x.dtype.element_ty
    acc: tl.constexpr = tl.float64 if ELEMENT.primitive_bitwidth == 64 else tl.float32
    if row.counts is not None:
        key = key_of(x.to(ELEMENT)) & (_VALUES - 1)
        first = tl.load(row.counts + key - 1, mask=here & (key > 0), other=0)
        last = tl.load(row.counts + key, mask=here, other=1)
    else:
        first = here.to(tl.int32) * 0
        first = _rank_in_list(row.keys, first, row.listed, 0.0, 1.0, 0.0, x, rounds, False, ELEMENT, acc)
        last = _rank_in_list(row.keys, first, row.listed, 0.0, 1.0, 0.0, x, rounds, True, ELEMENT, acc)
        if row.ranks is not None:
            first = tl.load(row.ranks + first)
            last = tl.load(row.ranks + last)
    return first, last


# Signs


@triton.jit
def signs(first, last, t, asked, other, top_k, tail_sign, rounds):
    """The sum ``[BLOCK]`` of the signs of ranks ``first .. last - 1``, which all have log2 p = ``t``, and how many of
    them are not 0; a sign is 1 where the own p is larger.
    """
    larger, no_smaller = _ranks_in(other, t, asked, rounds)
    end = tl.minimum(last, top_k)
    plus = tl.maximum(end - tl.maximum(first, no_smaller), 0)
    minus = tl.maximum(tl.minimum(end, larger) - first, 0)
    in_tail = tl.maximum(last - tl.maximum(first, top_k), 0)
    return plus - minus + in_tail * tail_sign, plus + minus + in_tail * tl.abs(tail_sign)


@triton.jit
def mean_of(total, length, acc: tl.constexpr):
    """Sums of signs are whole numbers, so that equal means are equal to the bit."""
    total = total.to(acc)
    return tl.where(length == 1, total, total / length.to(acc))


@triton.jit
def is_open(row, key, here):
    """Whether items of a list of ``triton_bins`` are logits, whose probabilities are not yet added up."""
    return tl.load(row.states + ((key >> 16) & (_VALUES - 1)), mask=here, other=0) == 0


@triton.jit
def sum_from(row, top_k, BLOCK: tl.constexpr):
    """The sum of p from rank ``top_k`` on."""
    ELEMENT: tl.constexpr = row.x.dtype.element_ty
    acc: tl.constexpr = tl.float64 if ELEMENT.primitive_bitwidth == 64 else tl.float32
    total = tl.zeros([BLOCK], acc)
    skipped = top_k
    if (row.counts is not None) or (row.ranks is not None):
        skipped = 0
    for start in range(skipped, row.listed, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < row.listed
        key = tl.load(row.keys + i, mask=here, other=0)
        x = logit_of(key, ELEMENT, acc)
        p = tl.exp2((x - row.peak) * row.factor)
        if row.counts is not None:
            first, last = run_of(row, x, here, 0)
            p *= tl.maximum(last - tl.maximum(first, top_k), 0).to(acc)
        if row.ranks is not None:
            here &= tl.load(row.ranks + i, mask=here, other=0) >= top_k
            here &= is_open(row, key, here)
        total += tl.where(here, p, 0.0)
    whole = tl.sum(total, 0)
    if row.sums is not None:
        whole += tl.load(row.sums + 2)
    return whole * row.weight


@triton.jit
def walk(own, other, steps_ptr, poison, top_k, tail_sign, rounds, STABLE: tl.constexpr, BLOCK: tl.constexpr):
    """Walks down one side's list: the sums of sign p and of sign p (x - peak), and the steps of the sign.

    A step's threshold is the last logit of the one before. Writes all of the slot's steps.
    """
    OWN: tl.constexpr = own.x.dtype.element_ty
    OTHER: tl.constexpr = other.x.dtype.element_ty
    acc: tl.constexpr = tl.float64 if OWN.primitive_bitwidth == 64 else tl.float32
    wide: tl.constexpr = tl.float64 if OTHER.primitive_bitwidth == 64 else acc
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], acc)
    moment = tl.zeros([BLOCK], acc)
    taken = tl.zeros([], tl.int32)  # steps behind the first one
    splits = tl.zeros([], tl.int32)  # logits that have several signs
    first_sign = tl.zeros([], acc)
    last_sign = tl.zeros([], acc)
    for start in range(0, own.listed, BLOCK):
        i = start + lane
        here = i < own.listed
        behind_one = here & (i > 0)
        key = tl.load(own.keys + i, mask=here, other=0)
        x = logit_of(key, OWN, acc)
        x_before = logit_at(own.keys, i - 1, behind_one, OWN, acc)
        first = i
        last = i + 1
        if own.counts is not None:
            first, last = run_of(own, x, here, rounds)
        else:
            if own.ranks is not None:
                first = tl.load(own.ranks + i, mask=here, other=0)
                last = tl.load(own.ranks + i + 1, mask=here, other=1)
            if not STABLE:
                x_behind = logit_at(own.keys, i + 1, i + 1 < own.listed, OWN, acc)
                tied = (behind_one & (x == x_before)) | ((i + 1 < own.listed) & (x == x_behind))
                if tl.max(tied.to(tl.int32), 0) > 0:
                    run_first, run_last = run_of(own, x, here, rounds)
                    first = tl.where(here, run_first, first)
                    last = tl.where(here, run_last, last)
        t = log2_p(x, own.peak, own.factor, own.log2_weight).to(wide)
        sum_of_signs, signed = signs(first, last, t, here, other, top_k, tail_sign, rounds)
        sign = mean_of(sum_of_signs, last - first, acc)
        below = x - own.peak
        p = tl.exp2(below * own.factor) * own.weight
        if own.ranks is not None:
            p = tl.where(is_open(own, key, here), p, 0.0)
        if own.counts is None:
            p *= sign
        else:
            p *= sum_of_signs.to(acc)
            if STABLE:
                uneven = here & (tl.abs(sum_of_signs) != last - first) & (signed > 0)
                splits += tl.sum(uneven.to(tl.int32), 0)
        total += tl.where(here, p, 0.0)
        moment += tl.where(here, p * below, 0.0)
        before = tl.gather(sign, tl.maximum(lane - 1, 0), 0)
        before = tl.where(lane == 0, last_sign, before)
        changes = (behind_one & (sign != before)).to(tl.int32)
        splits += tl.sum(tl.where(x == x_before, changes, 0), 0)
        place = taken + tl.cumsum(changes, 0)
        written = (changes > 0) & (place < _STEPS)
        tl.store(steps_ptr + 2 * place, x_before, mask=written)
        tl.store(steps_ptr + 2 * place + 1, sign, mask=written)
        taken += tl.sum(changes, 0)
        first_sign += tl.sum(tl.where(i == 0, sign, 0.0), 0)
        last_sign = tl.sum(tl.where(lane == BLOCK - 1, sign, 0.0), 0)
    step = tl.arange(0, _STEPS)
    fails = (splits > 0) | (taken >= _STEPS)
    count = tl.where(fails, -1, taken + 1)
    count = tl.where(poison != 0, 1, count)  # NaN: one sign of NaN
    head = tl.where(step == 0, count.to(acc), 0.0)
    tl.store(steps_ptr + 2 * step, head, mask=(step == 0) | (step > taken))
    tl.store(steps_ptr + 2 * step + 1, tl.where(step == 0, first_sign + poison, 0.0), mask=(step == 0) | (step > taken))
    whole = tl.sum(total, 0) + poison
    whole_moment = tl.sum(moment, 0)
    if own.sums is not None:
        whole += (tl.load(own.sums) + tail_sign.to(acc) * tl.load(own.sums + 2)) * own.weight
        whole_moment += (tl.load(own.sums + 1) + tail_sign.to(acc) * tl.load(own.sums + 3)) * own.weight
    return whole, whole_moment
