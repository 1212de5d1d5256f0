"""match_columns on a GPU: the costs of blocks of student columns from one read of the logits, and the greedy choice
from their minima, one program for each sequence.

Probabilities are 2^((x - peak) factor) weight, of three numbers a row. A row in which anything is not finite, on either
side, has the weight NaN, which makes all costs of its sequence NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels import triton_rows as rows
from mlot_kernels.checks import accumulator
from mlot_kernels.ops.match_columns import reference
from mlot_kernels.triton_rows import exponent_factor, row_of
from mlot_kernels.triton_tiles import launch_options

BLOCK = 64  # student columns whose costs with a tile of the teacher's one program makes, and which have one minimum
TERMS = 64  # rows that are added one after the other; their sums are added then


@triton.jit
def _prepare(
    index_ptr,
    log_scale_ptr,
    teacher_ptr,
    log_total_ptr,
    scale_ptr,
    factor_ptr,
    weight_ptr,
    probability_ptr,
    slots,
    k,
    batch_stride,
    row_stride,
    column_stride,
    temperature_bits,
    K: tl.constexpr,
):
    """Owns one slot: reads its scalars and the teacher's k log-probabilities; writes its factor and weight, and the
    teacher's probabilities. Where no row counts all are 0, and the teacher is not read.
    """
    acc: tl.constexpr = factor_ptr.dtype.element_ty
    wide: tl.constexpr = probability_ptr.dtype.element_ty
    slot = tl.program_id(0)
    counts = tl.load(index_ptr + slot) >= 0
    end = tl.where(counts, k, 0)
    sequence = (slot // slots).to(tl.int64)
    teacher_ptr += sequence * batch_stride + (slot % slots).to(tl.int64) * row_stride
    zeros = tl.zeros([K], wide)
    for start in range(0, k, K):
        i = start + tl.arange(0, K)
        log_t = tl.load(teacher_ptr + i.to(tl.int64) * column_stride, mask=i < end, other=float("-inf")).to(wide)
        t = tl.exp(log_t)
        zeros += t * 0
        tl.store(probability_ptr + slot.to(tl.int64) * k + i, t, mask=i < k)
    log_scale = tl.zeros([], acc)
    if log_scale_ptr is not None:
        log_scale = tl.where(counts, tl.load(log_scale_ptr + slot).to(acc), 0.0)
    weight = tl.exp(log_scale - tl.load(log_total_ptr + slot))
    weight += weight * 0 + tl.sum(zeros, 0).to(acc)  # NaN as soon as one of them is not finite
    scale = tl.where(counts, tl.load(scale_ptr + slot), 1.0)
    factor = exponent_factor(temperature_bits, scale, acc)
    tl.store(factor_ptr + slot, tl.where(counts, factor, 0.0))
    tl.store(weight_ptr + slot, tl.where(counts, weight, 0.0))


@triton.jit
def _zeros(ptr, end, K: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros ``[K, BLOCK]`` that lie in the threads as a load of them would: four neighbouring columns in each.

    It is a load of nothing. Sums that start from ``tl.zeros`` have one column in a thread, and more numbers to read.
    """
    none = tl.arange(0, K) < tl.minimum(end, 0)
    place = tl.arange(0, K)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return tl.load(ptr + place, mask=none[:, None], other=0.0)


@triton.jit
def _rows_of(index_ptr, sequence, slots):
    """How many slots of a sequence there are up to the last one that counts."""
    index_ptr += sequence.to(tl.int64) * slots
    last = tl.zeros([256], tl.int32)
    for start in range(0, slots, 256):
        a = start + tl.arange(0, 256)
        counts = tl.load(index_ptr + a, mask=a < slots, other=-1) >= 0
        last = tl.maximum(last, tl.where(counts, a + 1, 0))
    return tl.max(last, 0)


@triton.jit
def _costs(
    values_ptr,
    index_ptr,
    column_mask_ptr,
    peak_ptr,
    factor_ptr,
    weight_ptr,
    probability_ptr,
    cost_ptr,
    minimum_ptr,
    slots,
    batch_stride,
    row_stride,
    vocab_size,
    k,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Owns BLOCK student columns of one sequence and K of the teacher's: reads these columns of all counted rows,
    writes their costs, and the smallest for each teacher column. inf where a column is not looked at.

    A cost is the sum of sums of TERMS slots, in their order, and depends on its two columns alone.
    """
    wide: tl.constexpr = cost_ptr.dtype.element_ty
    acc: tl.constexpr = peak_ptr.dtype.element_ty
    blocks = tl.cdiv(vocab_size, BLOCK)
    sequence = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    columns = block * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(1) * K + tl.arange(0, K)
    total = _zeros(cost_ptr, vocab_size, K, BLOCK)
    part = total
    for a in tl.range(0, _rows_of(index_ptr, sequence, slots), loop_unroll_factor=2):
        slot = sequence * slots + a
        x_ptr, counts = row_of(values_ptr, index_ptr, slot, slots, batch_stride, row_stride)
        end = tl.where(counts, vocab_size, 0)
        x = tl.load(x_ptr + columns, mask=columns < end, other=float("-inf")).to(acc)
        peak = tl.load(peak_ptr + slot)
        s = tl.exp2((x - peak) * tl.load(factor_ptr + slot)) * tl.load(weight_ptr + slot)
        t = tl.load(probability_ptr + slot.to(tl.int64) * k + i, mask=i < k, other=0)
        part += tl.abs(t[:, None] - tl.where(columns < end, s, 0.0).to(wide)[None, :])
        if a % TERMS == TERMS - 1:
            total += part
            part = tl.zeros([K, BLOCK], wide)
    total += part
    looked_at = columns < vocab_size
    if column_mask_ptr is not None:
        looked_at &= tl.load(column_mask_ptr + columns, mask=columns < vocab_size, other=0) != 0
    total = tl.where(looked_at[None, :], total, float("inf"))
    row = sequence.to(tl.int64) * k + i
    exists = (i < k)[:, None] & (columns < vocab_size)[None, :]
    tl.store(cost_ptr + row[:, None] * vocab_size + columns[None, :], total, mask=exists)
    tl.store(minimum_ptr + row * blocks + block, tl.min(total, 1), mask=i < k)


@triton.jit
def _choose(
    cost_ptr,
    minimum_ptr,
    columns_ptr,
    vocab_size,
    k,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    MINIMA: tl.constexpr,
):
    """Owns one sequence: writes its k columns. Reads for each the minima of all blocks and the costs of one block.

    Overwrites both: a column that is taken costs inf for the teacher columns behind.
    """
    wide: tl.constexpr = cost_ptr.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(vocab_size, BLOCK)
    cost_ptr += sequence * k * vocab_size
    minimum_ptr += sequence * k * blocks
    infinity = float("inf")
    own_cost_ptr, own_minimum_ptr = cost_ptr, minimum_ptr
    for i in range(0, k):
        lowest = tl.full([MINIMA], infinity, wide)
        where = tl.full([MINIMA], 0, tl.int32)
        for start in range(0, blocks, MINIMA):
            place = start + tl.arange(0, MINIMA)
            found = tl.load(own_minimum_ptr + place, mask=place < blocks, other=infinity)
            lower = found < lowest
            lowest = tl.where(lower, found, lowest)
            where = tl.where(lower, place, where)
        least = tl.min(lowest, 0)
        block = tl.min(tl.where(lowest == least, where, blocks), 0)  # the first of equals
        column = tl.full([], -1, tl.int64)
        if least < infinity:
            columns = block * BLOCK + tl.arange(0, BLOCK)
            own = tl.load(own_cost_ptr + columns, mask=columns < vocab_size, other=infinity)
            taken = tl.min(tl.where(own == least, columns, vocab_size), 0)
            for start in range(i + 1, k, K):
                behind = (start + tl.arange(0, K)).to(tl.int64)
                places = behind[:, None] * vocab_size + columns[None, :]
                exists = (behind < k)[:, None] & (columns < vocab_size)[None, :]
                cost = tl.load(cost_ptr + places, mask=exists, other=infinity)
                cost = tl.where((columns == taken)[None, :], infinity, cost)
                tl.store(cost_ptr + behind * vocab_size + taken, tl.full([K], infinity, wide), mask=behind < k)
                tl.store(minimum_ptr + behind * blocks + block, tl.min(cost, 1), mask=behind < k)
            column = taken.to(tl.int64)
        tl.store(columns_ptr + sequence * k + i, column)
        own_cost_ptr += vocab_size
        own_minimum_ptr += blocks
        tl.debug_barrier()  # what was written is read for the next column


def _options(kernel: str, device: torch.device, k: int) -> dict[str, Any]:
    """What it is launched with, for no more teacher columns at a time than there are."""
    launch = launch_options(f"match_columns.{kernel}", device)
    return {**launch, "K": min(launch["K"], triton.next_power_of_2(k))}


def _all_costs(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    temperature: float,
    standardize: bool,
    vocab_size: int,
    teacher: Tensor,
) -> tuple[Tensor, Tensor]:
    """The costs ``[B, k, vocab_size]``, and the smallest of each block, ``[B, k, blocks]``."""
    (B, A), k = index.shape, teacher.shape[2]
    wide = accumulator(torch.promote_types(values.dtype, teacher.dtype))
    index = index.contiguous()
    scalars = rows.statistics(values, index, (temperature,), standardize, vocab_size)
    peak = scalars.peak.clone()  # the others need not stay
    factor, weight = peak.new_empty(2, B, A).unbind()
    probability = peak.new_empty(B, A, k, dtype=wide)
    if B * A:
        _prepare[(B * A,)](
            index,
            None if log_scale is None else log_scale.contiguous(),
            teacher,
            scalars.log_total,
            scalars.scale,
            factor,
            weight,
            probability,
            A,
            k,
            *teacher.stride(),
            rows.bits_of(temperature),
            **_options("prepare", values.device, k),
        )
    del scalars
    blocks = triton.cdiv(vocab_size, BLOCK)
    cost = peak.new_empty(B, k, vocab_size, dtype=wide)
    minimum = cost.new_empty(B, k, blocks)
    if B:
        launch = _options("costs", values.device, k)
        _costs[(B * blocks, triton.cdiv(k, launch["K"]))](
            values,
            index,
            column_mask,
            peak,
            factor,
            weight,
            probability,
            cost,
            minimum,
            A,
            *values.stride()[:2],
            vocab_size,
            k,
            BLOCK=BLOCK,
            TERMS=TERMS,
            **launch,
        )
    return cost, minimum


@torch.no_grad()
def match_columns(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    temperature: float,
    standardize: bool,
    vocab_size: int,
    teacher: Tensor,
    method: str,
) -> Tensor:
    """The columns ``[B, k]``; an assignment is SciPy's, of one sequence's costs at a time."""
    B, k = teacher.shape[0], teacher.shape[2]
    cost, minimum = _all_costs(values, index, column_mask, log_scale, temperature, standardize, vocab_size, teacher)
    columns = index.new_empty(B, k)
    if method == "optimal":
        for one, costs in zip(columns, cost, strict=True):
            one.copy_(reference.assignment(costs.cpu()))
    elif B:
        _choose[(B,)](
            cost,
            minimum,
            columns,
            vocab_size,
            k,
            BLOCK=BLOCK,
            **_options("choose", values.device, k),
        )
    return columns
