"""Small transport problems on a GPU: one program solves one problem, whose densities stay in its registers.

D is made once for as long as the scalings stay within ``_BEYOND`` of its base ("scaling"), or anew in each step, by one
exp per element ("log"); "auto" decides for each problem by the range of its costs. See ``triton_transport`` for D.
"""

from __future__ import annotations

import math
from typing import Any

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
    exponent,
    put,
    reciprocal,
    shift_of,
    side,
    weight_of,
)

ELEMENTS = 4096  # of the largest tile that one program holds in both directions; float64: half of it
LONGEST = 128  # side of a large tile; vectors of a longer one take the registers
LONG_ELEMENTS = 1024  # of the largest tile with a longer side
_WIDEST_SCALING: tl.constexpr = tl.constexpr(80.0)  # range(C) / epsilon up to which "auto" scales
_BEYOND: tl.constexpr = tl.constexpr(30.0 / math.log(2))  # |log2 u| at which a scaling is taken into the base
_BEYOND_DOUBLE: tl.constexpr = tl.constexpr(300.0 / math.log(2))
_LOG2E: tl.constexpr = tl.constexpr(LOG2E)
DOMAINS = {"auto": 0, "log": 1, "scaling": 2}


def holds(cost: Tensor) -> bool:
    """Whether one program can hold a problem of this shape."""
    R, C = _rows(cost), _columns(cost)
    most = ELEMENTS if max(R, C) <= LONGEST else LONG_ELEMENTS
    elements = R * C * (2 if cost.dtype == torch.float64 else 1)
    return elements <= most


def _rows(cost: Tensor) -> int:
    return triton.next_power_of_2(max(cost.shape[1], 1))


def _columns(cost: Tensor) -> int:
    return triton.next_power_of_2(max(cost.shape[2], 1))


def launch_of(cost: Tensor, kernel: str) -> dict[str, Any]:
    """The tile, and a warp for every ``WARP`` elements of it: with twice as many, three tiles at once would spill."""
    launch = dict(launch_options(kernel, cost.device))
    R, C = _rows(cost), _columns(cost)
    launch["num_warps"] = min(max(R * C // launch.pop("WARP"), 1), launch["num_warps"])
    return {"R": R, "C": C, **launch}


@triton.jit
def extent_of(costs, DOMAIN: tl.constexpr, epsilon):
    """The lowest cost; whether every step makes its own D."""
    lowest = tl.min(tl.min(costs, 1), 0)
    highest = tl.max(tl.max(tl.where(costs == float("inf"), float("-inf"), costs), 1), 0)
    each_step = highest - lowest > _WIDEST_SCALING * epsilon
    if DOMAIN != 0:
        each_step = tl.full([], DOMAIN == 1, tl.int1)
    return lowest, each_step


@triton.jit
def _first_step(cost_ptr, i, j, a, b, row_stride, column_stride, lowest, scale):
    """F and G of step 1, in logarithms. Reads the costs twice: held besides X they would take the registers."""
    X = exponent(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), lowest, scale, tl.zeros_like(a))
    shift = shift_of(tl.max(X, 1))
    F = tl.where(a != 0, -(shift + tl.log2(tl.sum(tl.exp2(X - shift[:, None]), 1))), 0.0)
    X = exponent(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), lowest, scale, F)
    shift = shift_of(tl.max(X, 0))
    G = tl.where(b != 0, -(shift + tl.log2(tl.sum(a[:, None] * tl.exp2(X - shift[None, :]), 0))), 0.0)
    return F, G


@triton.jit
def must_absorb(u, v, each_step):
    """Whether the step after one that ended at u and v makes a new base. NaN makes none."""
    limit = _BEYOND_DOUBLE if u.dtype == tl.float64 else _BEYOND
    beyond = tl.sum((tl.abs(tl.log2(u)) > limit).to(tl.int32), 0) + tl.sum((tl.abs(tl.log2(v)) > limit).to(tl.int32), 0)
    return (beyond > 0) | each_step


@triton.jit
def _solve(
    cost_ptr,
    a_ptr,
    b_ptr,
    weight_ptr,
    transported_ptr,
    regularized_ptr,
    plan_ptr,
    row_potential_ptr,
    column_potential_ptr,
    done_ptr,
    row_history_ptr,
    column_history_ptr,
    batch_stride,
    row_stride,
    column_stride,
    M,
    N,
    iterations,
    epsilon_bits,
    scale_bits,
    limit_bits,
    DOMAIN: tl.constexpr,
    TOLERANT: tl.constexpr,
    KEEP: tl.constexpr,
    PLAN: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Owns one problem: reads its cost, as often as it makes a D anew, and writes all of its outputs."""
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, R), tl.arange(0, C)
    a, b = side(a_ptr, problem, i, M), side(b_ptr, problem, j, N)
    epsilon, scale = double_of(epsilon_bits).to(a.dtype), double_of(scale_bits).to(a.dtype)
    limit = double_of(limit_bits).to(a.dtype)
    cost_ptr += problem * batch_stride
    lowest, each_step = extent_of(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), DOMAIN, epsilon)
    lowest = tl.where(tl.max(b, 0) == 0, 0.0, lowest)
    F, G = _first_step(cost_ptr, i, j, a, b, row_stride, column_stride, lowest, scale)
    D = density(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), lowest, scale, F, G)
    u, v = tl.full([R], 1.0, a.dtype), tl.full([C], 1.0, a.dtype)
    first = problem * iterations
    if KEEP:
        put(row_history_ptr, first, i, M, F)
        put(column_history_ptr, first, j, N, G)
    step = tl.full([], 1, tl.int32)
    going = step < iterations
    if TOLERANT:
        counts = b != 0
        still = tl.where(counts, tl.abs(G + tl.log2(tl.where(counts, b, 1.0))), 0.0) <= limit
        going = going & (tl.sum(still.to(tl.int32), 0) < C)
    absorb = tl.zeros([], tl.int1)
    while going:
        if absorb:
            F += tl.log2(u)
            G += tl.log2(v)
            v = tl.full([C], 1.0, a.dtype)
            D = density(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), lowest, scale, F, G)
        u = reciprocal(tl.sum(D * (b * v)[None, :], 1), a)
        following = reciprocal(tl.sum(D * (a * u)[:, None], 0), b)
        going = step + 1 < iterations
        if TOLERANT:
            still = tl.abs(tl.log2(following / v)) <= limit
            going = going & (tl.sum(still.to(tl.int32), 0) < C)
        v = following
        if KEEP:
            put(row_history_ptr, first + step, i, M, u)
            put(column_history_ptr, first + step, j, N, v)
        step += 1
        absorb = must_absorb(u, v, each_step)
    if KEEP:
        for unused in range(step, iterations):
            put(row_history_ptr, first + unused, i, M, tl.zeros_like(u))
            put(column_history_ptr, first + unused, j, N, tl.zeros_like(v))
    tl.store(done_ptr + problem, step.to(tl.int64))

    a, b = side(a_ptr, problem, i, M), side(b_ptr, problem, j, N)  # anew: kept through the steps they spill
    P = D * (a * u)[:, None] * (b * v)[None, :]
    mass = tl.sum(P, 1)
    if PLAN:
        at = (problem * M + i)[:, None] * N + j[None, :]
        counted = (a != 0)[:, None] & (b != 0)[None, :]
        tl.store(plan_ptr + at, tl.where(counted, P, 0.0), mask=(i < M)[:, None] & (j < N)[None, :])
    costs = cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride)
    moved = carried_only(P, P * costs) * weight_of(weight_ptr, problem, j, b, N)[None, :]
    tl.store(transported_ptr + problem, tl.sum(tl.sum(moved, 1), 0))
    F += tl.log2(u)
    G += tl.log2(v)
    unit = (double_of(epsilon_bits) / _LOG2E).to(a.dtype)
    surprise = tl.sum(mass * F, 0) + tl.sum(b * G, 0)
    tl.store(regularized_ptr + problem, unit * surprise + lowest * tl.sum(mass, 0))
    f = lowest + unit * (F + tl.log2(tl.where(a != 0, a, 1.0)))
    g = unit * (G + tl.log2(tl.where(b != 0, b, 1.0)))
    put(row_potential_ptr, problem, i, M, tl.where(a != 0, f, 0.0))
    put(column_potential_ptr, problem, j, N, tl.where(b != 0, g, 0.0))


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
    """Fills ``outputs``, those of the operator; a and b are those of ``marginals_of``."""
    B, M, N = cost.shape
    transported, regularized, plan, row_potential, column_potential, done, row_history, column_history = outputs
    # Moves within the last places of v are none.
    limit = (tolerance + 4 * torch.finfo(a.dtype).eps) * LOG2E
    _solve[(B,)](
        cost,
        a,
        b,
        column_weight,
        transported,
        regularized,
        plan,
        row_potential,
        column_potential,
        done,
        row_history,
        column_history,
        *cost.stride(),
        M,
        N,
        iterations,
        bits_of(epsilon),
        bits_of(LOG2E / epsilon),
        bits_of(limit),
        DOMAIN=DOMAINS[domain],
        TOLERANT=tolerance > 0,
        KEEP=keep,
        PLAN=return_plan,
        **launch_of(cost, "transport_resident.solve"),
    )
