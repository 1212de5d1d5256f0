"""Transport problems of any size on a GPU: a step is one launch, in which each program owns a slab of rows.

A program updates its own rows and leaves its part of the column sums in ``[B, slabs, N]``. In the next launch each
program adds these parts up for itself, in their order; that is less than the slab's own costs as long as a slab has as
many rows as there are slabs. D is made anew in every step, in either domain: it would come from the same cache as the
cost, and the one exp per element is less than the reading. So each step takes the scalings of the one before into the
base, and the scalings that the histories hold are each relative to all steps before. See ``triton_transport`` for D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.triton_rows import bits_of, double_of
from mlot_kernels.triton_tiles import launch_options
from mlot_kernels.triton_transport import (
    LOG2E,
    carried_only,
    cost_tile,
    density,
    put,
    reciprocal,
    side,
    weight_of,
)
from mlot_kernels.triton_transport_first import first_step
from mlot_kernels.triton_transport_slabs import Sizes, added_up, lowest_costs, lowest_of, owns, slab_of


@triton.jit
def _columns_before(b_ptr, base_ptr, part_ptr, problem, slabs, j, N, later, R: tl.constexpr):
    """b, the v ``[C]`` that the step before left in parts (1 if that was step 1), and the base it is relative to."""
    b = side(b_ptr, problem, j, N)
    v = tl.zeros_like(b) + 1
    if later:
        v = reciprocal(added_up(part_ptr, problem, slabs, j, N, R, b), b)
    return b, v, side(base_ptr, problem, j, N)


@triton.jit
def _keep(history_ptr, place, j, N, v, later):
    """Step 1 has no v: its place holds G."""
    if later:
        put(history_ptr, place, j, N, v)


@triton.jit
def _moves(
    b_ptr, base_ptr, part_ptr, problem, slabs, N, later, limit, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Whether the step before moved a column by more than the tolerance. NaN moves."""
    moved = tl.zeros([C], tl.int32)
    for start in range(0, N, C):
        j = start + tl.arange(0, C)
        b, v, G = _columns_before(b_ptr, base_ptr, part_ptr, problem, slabs, j, N, later, R)
        by = tl.log2(v)
        if not later:
            by = G + tl.log2(tl.where(b != 0, b, 1.0))
        moved += 1 - (tl.where(b != 0, tl.abs(by), 0.0) <= limit).to(tl.int32)
    return tl.sum(moved, 0) > 0


@triton.jit
def _sweep(
    cost_ptr, a_ptr, row_base_ptr, u_ptr, history_ptr, problem, place, first_row, j, b, G, lowest, scale,
    row_stride, column_stride, M, KEEP: tl.constexpr, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A step's work on the S rows from ``first_row`` on, in tiles of whole ones; returns their column sums ``[C]``."""
    parts = tl.zeros([R, C], b.dtype)
    for tile in range(0, S, R):
        i = first_row + tile + tl.arange(0, R)
        a = side(a_ptr, problem, i, M)
        F = side(row_base_ptr, problem, i, M) + tl.log2(tl.where(a != 0, side(u_ptr, problem, i, M), 1.0))
        D = density(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), lowest, scale, F, G)
        u = reciprocal(tl.sum(D * b[None, :], 1), a)
        put(row_base_ptr, problem, i, M, F)
        put(u_ptr, problem, i, M, u)
        if KEEP:
            put(history_ptr, place, i, M, u)
        parts += D * (a * u)[:, None]
    return tl.sum(parts, 0)


@triton.jit
def _all_steps(
    cost_ptr, a_ptr, b_ptr, extent_ptr, row_base_ptr, u_ptr, row_history_ptr, column_history_ptr, done_ptr,
    bases_ptr, parts_ptr, batch_stride, row_stride, column_stride, M, N, problems, iterations, scale_bits, limit_bits,
    KEEP: tl.constexpr, TOLERANT: tl.constexpr,
    S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Owns one problem that is one slab: makes all steps after the first, and leaves what ``_step`` would leave.

    Its costs are read in each step; they stay in the cache next to it. Columns stay in registers.
    """
    problem = tl.program_id(0).to(tl.int64)
    acc: tl.constexpr = a_ptr.dtype.element_ty
    first = problem * iterations
    cost_ptr += problem * batch_stride
    scale, limit = double_of(scale_bits).to(acc), double_of(limit_bits).to(acc)
    lowest = tl.load(extent_ptr + problem)
    j = tl.arange(0, C)
    b, G = side(b_ptr, problem, j, N), side(bases_ptr, problem, j, N)
    counts = b != 0
    sums = tl.where(counts, 1.0, tl.zeros_like(b))
    v = tl.zeros_like(b) + 1
    step = tl.full([], 1, tl.int32)
    going = step < iterations
    if TOLERANT:
        still = tl.where(counts, tl.abs(G + tl.log2(tl.where(counts, b, 1.0))), 0.0) <= limit
        going = going & (tl.sum(still.to(tl.int32), 0) < C)
    while going:
        G += tl.log2(v)
        sums = _sweep(
            cost_ptr, a_ptr, row_base_ptr, u_ptr, row_history_ptr, problem, first + step, 0, j, b, G, lowest,
            scale, row_stride, column_stride, M, KEEP, S, R, C,
        )  # fmt: skip
        v = reciprocal(sums, b)
        if KEEP:
            put(column_history_ptr, first + step, j, N, v)
        step += 1
        going = step < iterations
        if TOLERANT:
            still = tl.abs(tl.log2(v)) <= limit
            going = going & (tl.sum(still.to(tl.int32), 0) < C)
        tl.debug_barrier()  # the next step's threads read what others wrote of F and u
    tl.store(done_ptr + problem, step.to(tl.int64))
    last = (step - 1) % 2
    put(bases_ptr + last * problems * N, problem, j, N, G)
    put(parts_ptr + last * problems * N, problem, j, N, sums)
    if KEEP:
        for unused in range(step, iterations):
            put(column_history_ptr, first + unused, j, N, tl.zeros([C], acc))
            for tile in range(0, S, R):
                put(row_history_ptr, first + unused, tile + tl.arange(0, R), M, tl.zeros([R], acc))


@triton.jit(do_not_specialize=["step"])
def _step(
    cost_ptr, a_ptr, b_ptr, extent_ptr, row_base_ptr, u_ptr, row_history_ptr, column_history_ptr, done_ptr,
    stop_before_ptr, stop_ptr, base_before_ptr, base_ptr, part_before_ptr, part_ptr,
    batch_stride, row_stride, column_stride, M, N, iterations, step, scale_bits, limit_bits,
    KEEP: tl.constexpr, TOLERANT: tl.constexpr,
    S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Owns one slab in step ``step`` (from 0, at least 1).

    It makes v of the step before of all slabs' parts and takes it and its rows' u into their base; writes the new u
    and its part of the new column sums. Of what all slabs' programs make, base and v, each writes a share.
    """
    problem, slab, slabs, place = slab_of(M, S)
    acc: tl.constexpr = a_ptr.dtype.element_ty
    first = problem * iterations
    later = step > 1
    going = step > 0
    if TOLERANT:
        going = tl.load(stop_before_ptr + problem) == 0
        if going:
            limit = double_of(limit_bits).to(acc)
            going = _moves(b_ptr, base_before_ptr, part_before_ptr, problem, slabs, N, later, limit, R, C)
        if slab == 0:
            tl.store(stop_ptr + problem, 1 - going.to(tl.int32))
    if going:
        if slab == 0:
            tl.store(done_ptr + problem, (step + 1).to(tl.int64))
        cost_ptr += problem * batch_stride
        scale = double_of(scale_bits).to(acc)
        lowest = lowest_of(extent_ptr, problem, slabs, 64)
        j = tl.arange(0, C)
        if WHOLE:
            b, v, G = _columns_before(b_ptr, base_before_ptr, part_before_ptr, problem, slabs, j, N, later, R)
            G += tl.log2(v)
            if slab == 0:
                put(base_ptr, problem, j, N, G)
                if KEEP:
                    _keep(column_history_ptr, first + step - 1, j, N, v, later)
            sums = _sweep(
                cost_ptr, a_ptr, row_base_ptr, u_ptr, row_history_ptr, problem, first + step, slab * S, j, b, G, lowest,
                scale, row_stride, column_stride, M, KEEP, S, R, C,
            )  # fmt: skip
            put(part_ptr, place, j, N, sums)
        else:
            i = slab * S + tl.arange(0, R)
            a = side(a_ptr, problem, i, M)
            F = side(row_base_ptr, problem, i, M) + tl.log2(tl.where(a != 0, side(u_ptr, problem, i, M), 1.0))
            total = tl.zeros([R], acc)
            for start in range(0, N, C):
                j = start + tl.arange(0, C)
                b, v, G = _columns_before(b_ptr, base_before_ptr, part_before_ptr, problem, slabs, j, N, later, R)
                G += tl.log2(v)
                if owns(start, slab, slabs, C):
                    put(base_ptr, problem, j, N, G)
                    if KEEP:
                        _keep(column_history_ptr, first + step - 1, j, N, v, later)
                D = density(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), lowest, scale, F, G)
                total += tl.sum(D * b[None, :], 1)
            u = reciprocal(total, a)
            put(row_base_ptr, problem, i, M, F)
            put(u_ptr, problem, i, M, u)
            if KEEP:
                put(row_history_ptr, first + step, i, M, u)
            for start in range(0, N, C):
                j = start + tl.arange(0, C)
                b, v, G = _columns_before(b_ptr, base_before_ptr, part_before_ptr, problem, slabs, j, N, later, R)
                G += tl.log2(v)
                D = density(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), lowest, scale, F, G)
                put(part_ptr, place, j, N, tl.sum(D * (a * u)[:, None], 0))
    else:
        if KEEP:
            for tile in range(0, S, R):
                i = slab * S + tile + tl.arange(0, R)
                put(row_history_ptr, first + step, i, M, tl.zeros([R], acc))
            for start in range(0, N, C):
                if owns(start, slab, slabs, C):
                    put(column_history_ptr, first + step, start + tl.arange(0, C), N, tl.zeros([C], acc))


@triton.jit
def _values(
    cost_ptr, a_ptr, b_ptr, weight_ptr, extent_ptr, row_base_ptr, u_ptr, column_history_ptr, done_ptr, bases_ptr,
    parts_ptr, row_potential_ptr, last_ptr, moved_ptr, surprise_ptr,
    batch_stride, row_stride, column_stride, M, N, problems, iterations, scale_bits,
    KEEP: tl.constexpr,
    S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Owns one slab: writes its rows' potentials, parts of the two values, and a share of v and G.

    The base and the parts of a problem's last step lie in the buffers of that step's parity.
    """
    problem, slab, slabs, place = slab_of(M, S)
    acc: tl.constexpr = a_ptr.dtype.element_ty
    cost_ptr += problem * batch_stride
    scale = double_of(scale_bits).to(acc)
    unit = (1 / double_of(scale_bits)).to(acc)
    lowest = lowest_of(extent_ptr, problem, slabs, 64)
    last = tl.load(done_ptr + problem) - 1
    bases_ptr += last % 2 * problems * N
    parts_ptr += last % 2 * problems * slabs * N
    sums = tl.zeros([R], acc)
    surprise = tl.zeros([R], acc)
    if WHOLE:
        j = tl.arange(0, C)
        b, v, G = _columns_before(b_ptr, bases_ptr, parts_ptr, problem, slabs, j, N, last > 0, R)
    for tile in range(0, S, R):
        i = slab * S + tile + tl.arange(0, R)
        a = side(a_ptr, problem, i, M)
        F, u = side(row_base_ptr, problem, i, M), tl.where(a != 0, side(u_ptr, problem, i, M), 1.0)
        mass = tl.zeros([R], acc)
        for start in range(0, N, C):
            if not WHOLE:
                j = start + tl.arange(0, C)
                b, v, G = _columns_before(b_ptr, bases_ptr, parts_ptr, problem, slabs, j, N, last > 0, R)
            costs = cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride)
            P = density(costs, lowest, scale, F, G)
            P = P * (a * u)[:, None] * (b * v)[None, :]
            mass += tl.sum(P, 1)
            sums += tl.sum(carried_only(P, P * costs) * weight_of(weight_ptr, problem, j, b, N)[None, :], 1)
            if owns(start, slab, slabs, C):
                put(last_ptr, problem, j, N, G + tl.log2(v))
                if KEEP:
                    _keep(column_history_ptr, problem * iterations + last, j, N, v, last > 0)
        F += tl.log2(u)
        surprise += mass * (lowest + unit * F)
        f = lowest + unit * (F + tl.log2(tl.where(a != 0, a, 1.0)))
        put(row_potential_ptr, problem, i, M, tl.where(a != 0, f, 0.0))
    tl.store(moved_ptr + place, tl.sum(sums, 0))
    tl.store(surprise_ptr + place, tl.sum(surprise, 0))


@triton.jit
def _plan(
    cost_ptr, a_ptr, b_ptr, extent_ptr, row_base_ptr, u_ptr, done_ptr, bases_ptr, parts_ptr, plan_ptr,
    batch_stride, row_stride, column_stride, M, N, problems, slabs, scale_bits, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Owns one tile of the plan: reads its costs, writes it. A kernel of its own: its addresses take registers."""
    problem, tile, _, _ = slab_of(M, R)
    acc: tl.constexpr = a_ptr.dtype.element_ty
    scale = double_of(scale_bits).to(acc)
    lowest = lowest_of(extent_ptr, problem, slabs, 64)
    last = tl.load(done_ptr + problem) - 1
    bases_ptr += last % 2 * problems * N
    parts_ptr += last % 2 * problems * slabs * N
    j = tl.program_id(1) * C + tl.arange(0, C)
    b, v, G = _columns_before(b_ptr, bases_ptr, parts_ptr, problem, slabs, j, N, last > 0, R)
    i = tile * R + tl.arange(0, R)
    a = side(a_ptr, problem, i, M)
    F, u = side(row_base_ptr, problem, i, M), tl.where(a != 0, side(u_ptr, problem, i, M), 1.0)
    costs = cost_tile(cost_ptr + problem * batch_stride, i, j, a, b, row_stride, column_stride)
    P = density(costs, lowest, scale, F, G) * (a * u)[:, None] * (b * v)[None, :]
    P = tl.where((a != 0)[:, None] & (b != 0)[None, :], P, 0.0)
    at = (problem * M + i)[:, None] * N + j[None, :]
    tl.store(plan_ptr + at, P, mask=(i < M)[:, None] & (j < N)[None, :])


@triton.jit
def _totals(
    b_ptr, last_ptr, moved_ptr, surprise_ptr, transported_ptr, regularized_ptr, column_potential_ptr,
    slabs, N, scale_bits, BLOCK: tl.constexpr,
):  # fmt: skip
    """Owns one problem: adds the slabs' parts of its values, writes the columns' potentials."""
    problem = tl.program_id(0).to(tl.int64)
    acc = b_ptr.dtype.element_ty
    unit = (1 / double_of(scale_bits)).to(acc)
    moved = tl.zeros([BLOCK], acc)
    regularized = tl.zeros([BLOCK], acc)
    for start in range(0, slabs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        moved += side(moved_ptr, problem, at, slabs)
        regularized += side(surprise_ptr, problem, at, slabs)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        b = side(b_ptr, problem, j, N)
        G = side(last_ptr, problem, j, N)
        regularized += b * (unit * G)
        g = unit * (G + tl.log2(tl.where(b != 0, b, 1.0)))
        put(column_potential_ptr, problem, j, N, tl.where(b != 0, g, 0.0))
    tl.store(transported_ptr + problem, tl.sum(moved, 0))
    tl.store(regularized_ptr + problem, tl.sum(regularized, 0))


def solve(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    column_weight: Tensor | None,
    outputs: tuple[Tensor, ...],
    epsilon: float,
    iterations: int,
    tolerance: float,
    domain: str,
    keep: bool,
    return_plan: bool,
) -> None:
    """Fills ``outputs``, those of the operator; a and b are those of ``marginals_of``. Both domains are one here."""
    transported, regularized, plan, row_potential, column_potential, done, row_history, column_history = outputs
    sizes = Sizes(cost)
    B, M, N, slabs = sizes.B, sizes.M, sizes.N, sizes.slabs
    scale, limit = bits_of(LOG2E / epsilon), bits_of((tolerance + 4 * torch.finfo(a.dtype).eps) * LOG2E)
    F, u = a.new_empty(2, B, M).unbind()
    bases, parts = a.new_empty(2, B, N), a.new_empty(2, B, slabs, N)
    stops = done.new_empty(2, B, dtype=torch.int32)
    extent = lowest_costs(cost, a, b, sizes)
    first_step(
        cost, a, b, extent, F, u, bases[0], (row_history, column_history), stops[0], done, parts[0], sizes, iterations,
        scale, keep,
    )  # fmt: skip
    if sizes.one_slab:
        _all_steps[sizes.rows](
            cost, a, b, extent, F, u, row_history, column_history, done, bases, parts, *sizes.matrix, B, iterations,
            scale, limit, KEEP=keep, TOLERANT=tolerance > 0, **sizes.tiles("transport_streamed.all_steps"),
        )  # fmt: skip
    for step in range(1, 0 if sizes.one_slab else iterations):
        before, now = (step - 1) % 2, step % 2
        _step[sizes.rows](
            cost, a, b, extent, F, u, row_history, column_history, done, stops[before], stops[now], bases[before],
            bases[now], parts[before], parts[now], *sizes.matrix, iterations, step, scale, limit,
            KEEP=keep, TOLERANT=tolerance > 0, **sizes.tiles("transport_streamed.step"),
        )  # fmt: skip
    last = torch.empty_like(b)
    moved, surprise = a.new_empty(2, B, slabs).unbind()
    _values[sizes.rows](
        cost, a, b, column_weight, extent, F, u, column_history, done, bases, parts, row_potential, last, moved,
        surprise, *sizes.matrix, B, iterations, scale, KEEP=keep, **sizes.tiles("transport_streamed.values"),
    )  # fmt: skip
    if return_plan and plan.numel():
        launch = launch_options("transport_streamed.plan", cost.device)
        _plan[(B * triton.cdiv(M, launch["R"]), triton.cdiv(N, launch["C"]))](
            cost, a, b, extent, F, u, done, bases, parts, plan, *sizes.matrix, B, slabs, scale, **launch,
        )  # fmt: skip
    _totals[(B,)](
        b, last, moved, surprise, transported, regularized, column_potential, slabs, N, scale,
        **launch_options("transport_streamed.totals", cost.device),
    )  # fmt: skip
