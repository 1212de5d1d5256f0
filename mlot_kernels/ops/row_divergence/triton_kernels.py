"""row_divergence on a GPU: both rows' scalars, what some kinds need of the pair besides, and then a walk down both.

One program walks a pair of rows. adaptive_kl and a mixture of logits each have a kernel of their own in between, which
leaves one scalar of the pair.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels import triton_rows
from mlot_kernels.logits import Side
from mlot_kernels.ops.row_divergence.reference import Options
from mlot_kernels.ops.row_divergence.triton_backward import backward
from mlot_kernels.ops.row_divergence.triton_pair import (
    Saved,
    are_whole,
    below_peak,
    constants_of,
    load_pair,
    log_softmaxes,
    looked_at,
    mixed,
    numbers_of,
    row_at,
)
from mlot_kernels.ops.row_divergence.triton_terms import EXACT, terms
from mlot_kernels.triton_rows import add_exponentials, double_of
from mlot_kernels.triton_sides import given
from mlot_kernels.triton_tiles import launch_options

__all__ = ["backward", "forward"]

_LOG2E: tl.constexpr = tl.constexpr(1 / math.log(2))


@triton.jit
def _mix(s, s_saved, t, t_saved, target_ptr, slots, numbers, BLOCK: tl.constexpr):
    """Owns one slot: reads both rows once, writes the log of the mixed logits' normaliser, and the student's anew.

    Both are made in one way, so that a row that is mixed with itself has two equal ones. 0 where either does not count.
    """
    wide: tl.constexpr = target_ptr.dtype.element_ty
    slot = tl.program_id(0)
    s_row, s_counts = row_at(s, s_saved, slot, slots)
    t_row, t_counts = row_at(t, t_saved, slot, slots)
    both = s_counts & t_counts
    end = tl.where(both, s.vocab_size, 0)
    factor = tl.full([1, 1], _LOG2E, wide)
    own_peak = tl.full([], float("-inf"), wide)
    peak = tl.full([], float("-inf"), wide)
    own_total = tl.zeros([1, BLOCK], wide)
    total = tl.zeros([1, BLOCK], wide)
    unused = tl.zeros([1, BLOCK], wide)
    columns = tl.arange(0, BLOCK)[None, :]
    for start in range(0, end, BLOCK):
        whole = start + BLOCK <= end
        own = (below_peak(s_row, start + columns, whole, end) * s_row.inverse).to(wide)
        other = (below_peak(t_row, start + columns, whole, end) * t_row.inverse).to(wide)
        peak, total, _moment = add_exponentials(mixed(own, other, numbers), peak, total, unused, factor)
        own_peak, own_total, _moment = add_exponentials(own, own_peak, own_total, unused, factor)
    log_total = tl.where(peak == float("-inf"), float("nan"), peak + tl.log(tl.sum(total)))
    own_log_total = tl.where(own_peak == float("-inf"), float("nan"), own_peak + tl.log(tl.sum(own_total)))
    tl.store(target_ptr + slot, tl.where(both, log_total, 0.0))
    tl.store(s_saved.log_total + slot, tl.where(both, own_log_total, 0.0).to(s_row.log_total.dtype))


@triton.jit
def _met_probabilities(
    s_row, t_row, pairs_ptr, constants, numbers, start, end, wide: tl.constexpr, BLOCK: tl.constexpr
):
    """q and p of a tile of the columns that meet, 0 from ``end`` on; p as integers, too, which sort as it does."""
    s_below, t_below, s_columns, t_columns, here = load_pair(s_row, t_row, pairs_ptr, start, end, BLOCK)
    log_q, log_p = log_softmaxes(s_row, s_below, t_row, t_below, tl.zeros([], wide), numbers, False)
    log_q, log_p = looked_at(s_row, s_columns, t_row, t_columns, here, log_q, log_p)
    q = tl.exp(log_q) * constants.q_scale
    p = tl.exp(log_p) * constants.p_scale
    return q, p, p.to(tl.int64 if wide == tl.float64 else tl.int32, bitcast=True)


@triton.jit
def _share(s, s_saved, t, t_saved, pairs_ptr, size, share_ptr, slots, numbers, BLOCK: tl.constexpr):
    """Owns one slot: writes adaptive_kl's w, the part of |p - q| that lies in the head of p; 0 where no pair counts.

    The head ends at the largest p that has, with all that is no smaller, more than its part of the mass. It is found by
    bisection of the bits of p between two values that occur, ``low``, which has so much, and ``high``: equal ones are
    never parted. Each step reads the teacher once; how many it takes, the row alone says. All sums are in one order,
    and a sum over fewer columns is never larger.
    """
    wide: tl.constexpr = share_ptr.dtype.element_ty
    slot = tl.program_id(0)
    s_row, s_counts = row_at(s, s_saved, slot, slots)
    t_row, t_counts = row_at(t, t_saved, slot, slots)
    both = s_counts & t_counts
    end = tl.where(both, size, 0)
    constants = constants_of(s_row, t_row, numbers, tl.full([], 1.0, wide), "adaptive_kl")
    KEY: tl.constexpr = tl.int64 if wide == tl.float64 else tl.int32
    MOST: tl.constexpr = 2**63 - 1 if wide == tl.float64 else 2**31 - 1
    masses = tl.zeros([BLOCK], wide)
    differences = tl.zeros([BLOCK], wide)
    lowest = tl.full([BLOCK], MOST, KEY)
    highest = tl.zeros([BLOCK], KEY)
    for start in range(0, end, BLOCK):
        q, p, key = _met_probabilities(s_row, t_row, pairs_ptr, constants, numbers, start, end, wide, BLOCK)
        masses += p
        differences += tl.abs(p - q)
        lowest = tl.minimum(lowest, key)
        highest = tl.maximum(highest, key)
    mass = tl.sum(masses, 0)
    whole = tl.sum(differences, 0)
    low = tl.min(lowest, 0)
    high = tl.max(highest, 0)
    bound = double_of(numbers.head) * mass.to(tl.float64)
    # Without a mass, as without a column, there is nothing to find: all is the head. A NaN shows in any case.
    high = tl.where(mass.to(tl.float64) > bound, high, low)
    while low < high:
        middle = low + (high - low + 1) // 2
        masses = tl.zeros([BLOCK], wide)
        above = tl.full([BLOCK], MOST, KEY)
        below = tl.zeros([BLOCK], KEY)
        for start in range(0, end, BLOCK):
            _q, p, key = _met_probabilities(s_row, t_row, pairs_ptr, constants, numbers, start, end, wide, BLOCK)
            masses += tl.where(key >= middle, p, 0.0)
            above = tl.minimum(above, tl.where(key >= middle, key, MOST))
            below = tl.maximum(below, tl.where(key >= middle, 0, key))
        enough = tl.sum(masses, 0).to(tl.float64) > bound
        low = tl.where(enough, tl.min(above, 0), low)
        high = tl.where(enough, high, tl.max(below, 0))
    differences = tl.zeros([BLOCK], wide)
    for start in range(0, end, BLOCK):
        q, p, key = _met_probabilities(s_row, t_row, pairs_ptr, constants, numbers, start, end, wide, BLOCK)
        differences += tl.where(key >= low, tl.abs(p - q), 0.0)
    share = tl.where(whole == 0, 0.5, tl.sum(differences, 0) / tl.where(whole == 0, 1.0, whole))
    tl.store(share_ptr + slot, tl.where(both, share + 0.0 * mass, 0.0))


@triton.jit
def _forward(
    s,
    s_saved,
    s_expected_ptr,
    t,
    t_saved,
    t_expected_ptr,
    pairs_ptr,
    size,
    loss_ptr,
    share_ptr,
    target_ptr,
    slots,
    numbers,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    FLOORS: tl.constexpr,
    MIXES: tl.constexpr,
    S_STANDARDIZE: tl.constexpr,
    T_STANDARDIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one slot: reads both rows once, writes the loss and what backward needs; zeros where neither row counts, and
    a loss of NaN where only one does.

    Each column's terms are added to those of the columns BLOCK apart, and these sums to one another.
    """
    wide: tl.constexpr = loss_ptr.dtype.element_ty
    s_acc: tl.constexpr = s_saved.peak.dtype.element_ty
    t_acc: tl.constexpr = t_saved.peak.dtype.element_ty
    slot = tl.program_id(0)
    s_row, s_counts = row_at(s, s_saved, slot, slots)
    t_row, t_counts = row_at(t, t_saved, slot, slots)
    both = s_counts & t_counts
    end = tl.where(both, size, 0)
    share = tl.full([], 1.0, wide)
    if KIND == "adaptive_kl":
        share = tl.load(share_ptr + slot)
    target_log_total = t_row.log_total.to(wide)
    if MIXES:
        target_log_total = tl.load(target_ptr + slot)
    constants = constants_of(s_row, t_row, numbers, share, KIND)
    loss = tl.zeros([BLOCK], wide)
    s_total = tl.zeros([BLOCK], wide)
    t_total = tl.zeros([BLOCK], wide)
    s_moment = tl.zeros([BLOCK], wide)
    t_moment = tl.zeros([BLOCK], wide)
    mixed_moment = tl.zeros([BLOCK], wide)
    for start in range(0, end, BLOCK):
        s_below, t_below, s_columns, t_columns, here = load_pair(s_row, t_row, pairs_ptr, start, end, BLOCK)
        log_q, log_target = log_softmaxes(s_row, s_below, t_row, t_below, target_log_total, numbers, MIXES)
        log_q, log_p = looked_at(s_row, s_columns, t_row, t_columns, here, log_q, log_target)
        term, of_q, of_p = terms(log_q, log_p, constants, KIND, WHOLE, FLOORS)
        loss += term
        s_total += of_q
        t_total += of_p
        if S_STANDARDIZE:
            s_moment += tl.where(s_below == float("-inf"), 0.0, of_q * s_below)
        if T_STANDARDIZE:
            t_moment += tl.where(t_below == float("-inf"), 0.0, of_p * t_below)
            if MIXES:
                mixed_moment += tl.where(t_below == float("-inf"), 0.0, tl.exp(log_target) * t_below)
    value = tl.sum(loss, 0)
    if WHOLE:
        value += constants.kappa * (constants.p_scale - constants.q_scale)
    tl.store(loss_ptr + slot, tl.where(both, value, tl.where(s_counts != t_counts, float("nan"), 0.0)))
    if KIND != "adaptive_kl":
        tl.store(share_ptr + slot, tl.where(both, share, 0.0))
    if not MIXES:
        tl.store(target_ptr + slot, tl.where(both, target_log_total, 0.0))
    s_sum = tl.sum(s_total, 0)
    t_sum = tl.sum(t_total, 0)
    s_through = tl.zeros([], wide)
    t_through = tl.zeros([], wide)
    if S_STANDARDIZE:
        s_through = tl.sum(s_moment, 0) - s_sum * tl.load(s_expected_ptr + slot)
    if T_STANDARDIZE:
        expected = tl.sum(mixed_moment, 0) if MIXES else tl.load(t_expected_ptr + slot)
        t_through = tl.sum(t_moment, 0) - t_sum * expected
    tl.store(s_saved.total + slot, s_sum.to(s_acc))
    tl.store(t_saved.total + slot, t_sum.to(t_acc))
    tl.store(s_saved.moment + slot, s_through.to(s_acc))
    tl.store(t_saved.moment + slot, t_through.to(t_acc))


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Arguments and outputs as in the schema."""
    sides, options = (Side(*arguments[:7]), Side(*arguments[7:14])), Options(*arguments[14:])
    B, A = sides[0].row_index.shape
    expectations, saved = [], []
    for side in sides:
        peak, log_total, expected, mean, scale, slope = triton_rows.statistics(
            side.values, side.row_index, (side.temperature,), side.standardize, side.vocab_size
        ).without_temperatures()
        total, moment = (peak.new_empty(B, A) for _ in range(2))
        expectations.append(expected)
        saved.append(Saved(peak, log_total, mean, scale, slope, total, moment))
    wide = torch.promote_types(saved[0].peak.dtype, saved[1].peak.dtype)
    loss, share, target_log_total = (saved[0].peak.new_empty(B, A, dtype=wide) for _ in range(3))
    if B * A:
        grid, device = (B * A,), sides[0].values.device
        s, t = (given(side) for side in sides)
        pairs = None if options.column_pairs is None else options.column_pairs.contiguous()
        size = sides[0].vocab_size if pairs is None else pairs.shape[0]
        numbers, mixes = numbers_of(options), options.interpolation < 1
        if mixes:
            launch = {**launch_options("row_divergence.mix", device), **EXACT}
            _mix[grid](s, saved[0], t, saved[1], target_log_total, A, numbers, **launch)
        if options.kind == "adaptive_kl":
            launch = {**launch_options("row_divergence.share", device), **EXACT}
            _share[grid](s, saved[0], t, saved[1], pairs, size, share, A, numbers, **launch)
        launch = {**launch_options("row_divergence.forward", device), **EXACT}
        _forward[grid](
            s,
            saved[0],
            expectations[0],
            t,
            saved[1],
            expectations[1],
            pairs,
            size,
            loss,
            share,
            target_log_total,
            A,
            numbers,
            KIND=options.kind,
            WHOLE=are_whole(sides, options),
            FLOORS=options.floor > 0,
            MIXES=mixes,
            S_STANDARDIZE=sides[0].standardize,
            T_STANDARDIZE=sides[1].standardize,
            **launch,
        )
    return loss, *saved[0], *saved[1], share, target_log_total
