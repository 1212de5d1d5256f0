"""Step 1 of streamed transport problems, on logarithms: it makes the base of the first D (``triton_transport``)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.triton_rows import double_of
from mlot_kernels.triton_transport import cost_tile, exponent, put, shift_of, side
from mlot_kernels.triton_transport_slabs import Sizes, lowest_of, slab_of


@triton.jit
def _rows(
    cost_ptr, a_ptr, b_ptr, extent_ptr, row_base_ptr, u_ptr, history_ptr, part_ptr,
    batch_stride, row_stride, column_stride, M, N, iterations, scale_bits,
    KEEP: tl.constexpr, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Owns one slab in step 1: writes F and the log2 of its part of the column sums."""
    problem, slab, slabs, place = slab_of(M, S)
    cost_ptr += problem * batch_stride
    acc: tl.constexpr = a_ptr.dtype.element_ty
    scale = double_of(scale_bits).to(acc)
    lowest = lowest_of(extent_ptr, problem, slabs, 64)
    column_peak = tl.full([C], float("-inf"), acc)
    column_total = tl.zeros([C], acc)
    for tile in range(0, S, R):
        i = slab * S + tile + tl.arange(0, R)
        a = side(a_ptr, problem, i, M)
        peak = tl.full([R], float("-inf"), acc)
        total = tl.zeros([R], acc)
        for start in range(0, N, C):
            j = start + tl.arange(0, C)
            b = side(b_ptr, problem, j, N)
            X = exponent(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), lowest, scale, tl.zeros_like(a))
            highest = tl.maximum(peak, tl.max(X, 1))
            shift = shift_of(highest)
            total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(X - shift[:, None]), 1)
            peak = highest
        F = tl.where(a != 0, -(shift_of(peak) + tl.log2(total)), 0.0)
        put(row_base_ptr, problem, i, M, F)
        put(u_ptr, problem, i, M, tl.full([R], 1.0, acc))
        if KEEP:
            put(history_ptr, problem * iterations, i, M, F)
        for start in range(0, N, C):
            j = start + tl.arange(0, C)
            b = side(b_ptr, problem, j, N)
            X = exponent(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), lowest, scale, F)
            highest = tl.max(X, 0)
            if WHOLE:
                highest = tl.maximum(column_peak, highest)
            shift = shift_of(highest)
            part = tl.sum(a[:, None] * tl.exp2(X - shift[None, :]), 0)
            if WHOLE:
                column_total = column_total * tl.exp2(column_peak - shift) + part
                column_peak = highest
            else:
                put(part_ptr, place, j, N, shift + tl.log2(part))
    if WHOLE:
        put(part_ptr, place, tl.arange(0, C), N, shift_of(column_peak) + tl.log2(column_total))


@triton.jit
def _columns(
    b_ptr, column_base_ptr, history_ptr, stop_ptr, done_ptr, part_ptr, slabs, N, iterations,
    KEEP: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Owns C columns in step 1: adds the slabs' parts in their order, writes G."""
    problem = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * C + tl.arange(0, C)
    b = side(b_ptr, problem, j, N)
    peak = tl.full([C], float("-inf"), b.dtype)
    total = tl.zeros([C], b.dtype)
    for start in range(0, slabs, R):
        s = start + tl.arange(0, R)
        at = (problem * slabs + s)[:, None] * N + j[None, :]
        part = tl.load(part_ptr + at, mask=(s < slabs)[:, None] & (j < N)[None, :], other=float("-inf"))
        highest = tl.maximum(peak, tl.max(part, 0))
        shift = shift_of(highest)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(part - shift[None, :]), 0)
        peak = highest
    G = tl.where(b != 0, -(shift_of(peak) + tl.log2(total)), 0.0)
    put(column_base_ptr, problem, j, N, G)
    if KEEP:
        put(history_ptr, problem * iterations, j, N, G)
    if tl.program_id(1) == 0:
        tl.store(done_ptr + problem, tl.full([], 1, tl.int64))
        tl.store(stop_ptr + problem, 0)


def first_step(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    extent: Tensor,
    row_base: Tensor,
    u: Tensor,
    column_base: Tensor,
    histories: tuple[Tensor, Tensor],
    stop: Tensor,
    done: Tensor,
    part: Tensor,
    sizes: Sizes,
    iterations: int,
    scale_bits: int,
    keep: bool,
) -> None:
    """Fills the bases, u, the histories' first places, ``stop`` and ``done``; ``part`` is scratch."""
    _rows[sizes.rows](
        cost, a, b, extent, row_base, u, histories[0], part, *sizes.matrix, iterations, scale_bits,
        KEEP=keep, **sizes.tiles("transport_first.rows"),
    )  # fmt: skip
    grid, launch = sizes.columns("transport_first.columns")
    _columns[grid](
        b, column_base, histories[1], stop, done, part, sizes.slabs, sizes.N, iterations, KEEP=keep, **launch
    )
