"""What is written of one side of a pair of rows, by whichever way they came into order."""

from __future__ import annotations

import triton
import triton.language as tl

from mlot_kernels.ops.sorted_l1.reference import STEPS
from mlot_kernels.ops.sorted_l1.triton_signs import sum_from, walk

_STEPS: tl.constexpr = tl.constexpr(STEPS[0])


@triton.jit
def write_no_pair(slot, counts, other_counts, saved):
    """Zeros where neither row counts; a sum, and so a loss, of NaN where only one does."""
    acc: tl.constexpr = saved.total.dtype.element_ty
    nothing = tl.zeros([], acc)
    tl.store(saved.total + slot, tl.where(counts != other_counts, float("nan"), nothing))
    tl.store(saved.moment + slot, nothing)
    steps_ptr = saved.steps + slot.to(tl.int64) * (2 * _STEPS)
    tl.store(steps_ptr + tl.arange(0, 2 * _STEPS), tl.zeros([2 * _STEPS], acc))


@triton.jit
def tail_sign_of(own, other, top_k, BLOCK: tl.constexpr):
    """The sign of the difference of the sums from rank ``top_k`` on; the opposite for the other side."""
    tail, other_tail = sum_from(own, top_k, BLOCK), sum_from(other, top_k, BLOCK)
    return (tail > other_tail).to(tl.int32) - (tail < other_tail).to(tl.int32)


@triton.jit
def write_side(
    slot,
    own,
    other,
    expected_ptr,
    saved,
    poison,
    top_k,
    tail_sign,
    rounds,
    STABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes what backward needs of a side; of the sums of sign p, the sum of both sides' is the loss."""
    acc: tl.constexpr = saved.total.dtype.element_ty
    steps_ptr = saved.steps + slot.to(tl.int64) * (2 * _STEPS)
    total, moment = walk(own, other, steps_ptr, poison.to(acc), top_k, tail_sign, rounds, STABLE, BLOCK)
    tl.store(saved.total + slot, total)
    tl.store(saved.moment + slot, moment - total * tl.load(expected_ptr + slot))
