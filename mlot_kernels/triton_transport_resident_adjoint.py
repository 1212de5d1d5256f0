"""The gradient of transport problems that one program holds: the steps of ``triton_transport_resident`` in reverse."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.triton_rows import bits_of, double_of
from mlot_kernels.triton_transport import (
    LOG2E,
    by_plan,
    carried_only,
    cost_tile,
    density,
    exponent,
    put,
    side,
    upstream_tile,
    weight_of,
)
from mlot_kernels.triton_transport_resident import DOMAINS, extent_of, launch_of, must_absorb

_LOG2E: tl.constexpr = tl.constexpr(LOG2E)


@triton.jit
def _bases(
    cost_ptr,
    a_ptr,
    b_ptr,
    done_ptr,
    row_history_ptr,
    column_history_ptr,
    row_base_ptr,
    column_base_ptr,
    fresh_ptr,
    batch_stride,
    row_stride,
    column_stride,
    M,
    N,
    iterations,
    epsilon_bits,
    DOMAIN: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Owns one problem: writes each step's base ``[B, L, M]`` and ``[B, L, N]`` and whether the step opened it.

    The first step's place holds its own F and G, which are also the second one's base.
    """
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, R), tl.arange(0, C)
    a, b = side(a_ptr, problem, i, M), side(b_ptr, problem, j, N)
    costs = cost_tile(cost_ptr + problem * batch_stride, i, j, a, b, row_stride, column_stride)
    _, each_step = extent_of(costs, DOMAIN, double_of(epsilon_bits).to(a.dtype))
    done = tl.load(done_ptr + problem).to(tl.int32)
    first = problem * iterations
    F, G = side(row_history_ptr, first, i, M), side(column_history_ptr, first, j, N)
    absorb = tl.zeros([], tl.int1)
    u, v = tl.full([R], 1.0, a.dtype), tl.full([C], 1.0, a.dtype)
    for step in range(0, done):
        if absorb:
            F += tl.log2(u)
            G += tl.log2(v)
        put(row_base_ptr, first + step, i, M, F)
        put(column_base_ptr, first + step, j, N, G)
        tl.store(fresh_ptr + first + step, (absorb | (step == 1)).to(tl.int8))
        if step > 0:
            u = tl.where(a != 0, side(row_history_ptr, first + step, i, M), 1.0)
            v = tl.where(b != 0, side(column_history_ptr, first + step, j, N), 1.0)
            absorb = must_absorb(u, v, each_step)


@triton.jit
def _differentiate(
    transported_ptr,
    regularized_ptr,
    grad_plan_ptr,
    cost_ptr,
    a_ptr,
    b_ptr,
    weight_ptr,
    done_ptr,
    row_history_ptr,
    column_history_ptr,
    row_base_ptr,
    column_base_ptr,
    fresh_ptr,
    grad_cost_ptr,
    grad_a_ptr,
    grad_b_ptr,
    grad_weight_ptr,
    batch_stride,
    row_stride,
    column_stride,
    M,
    N,
    iterations,
    epsilon_bits,
    scale_bits,
    PLAN: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Owns one problem: goes back over its steps and writes all of its gradients.

    With G_bar = dl/dG after a step, F_bar = dl/dF, alpha = v G_bar and beta = u F_bar (README), a step adds
    D o (a u alpha^T + beta (b v_before)^T) to epsilon dl/dC.
    """
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, R), tl.arange(0, C)
    a, b = side(a_ptr, problem, i, M), side(b_ptr, problem, j, N)
    epsilon, scale = double_of(epsilon_bits).to(a.dtype), double_of(scale_bits).to(a.dtype)
    unit = (double_of(epsilon_bits) / _LOG2E).to(a.dtype)
    cost_ptr += problem * batch_stride
    costs = cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride)
    lowest = tl.min(tl.min(costs, 1), 0)
    lowest = tl.where(tl.max(b, 0) == 0, 0.0, lowest)
    step = tl.load(done_ptr + problem).to(tl.int32) - 1  # of the last one, from 0
    first = problem * iterations
    F, G = side(row_base_ptr, first + step, i, M), side(column_base_ptr, first + step, j, N)
    u, v = tl.full([R], 1.0, a.dtype), tl.full([C], 1.0, a.dtype)
    if step > 0:
        u = tl.where(a != 0, side(row_history_ptr, first + step, i, M), 1.0)
        v = tl.where(b != 0, side(column_history_ptr, first + step, j, N), 1.0)
    D = density(costs, lowest, scale, F, G)
    P = D * (a * u)[:, None] * (b * v)[None, :]
    weight = weight_of(weight_ptr, problem, j, b, N)
    transported, regularized = tl.load(transported_ptr + problem), tl.load(regularized_ptr + problem)
    extra = upstream_tile(grad_plan_ptr + problem * M * N, i, j, M, N, PLAN, P)
    F_last, G_last = F + tl.log2(u), G + tl.log2(v)
    S = by_plan(P, costs, F_last, G_last, weight, extra, transported, regularized, lowest, epsilon, unit)
    put(grad_weight_ptr, problem, j, N, transported * tl.sum(carried_only(P, P * costs), 0))
    total = P * (epsilon * (transported * weight + regularized))[None, :] - S  # epsilon dl/dC
    own, G_bar = tl.sum(S, 1), tl.sum(S, 0)
    F_sum = -epsilon * regularized * tl.sum(P, 1)  # KL's own dependence on the marginals, beside that through the plan
    G_sum = -epsilon * regularized * b
    mass = tl.sum(b, 0)
    mass = tl.where(mass == 0, 1.0, mass)
    while step > 0:
        fresh = tl.load(fresh_ptr + first + step) != 0
        v_before = tl.full([C], 1.0, a.dtype)
        if not fresh:
            v_before = tl.where(b != 0, side(column_history_ptr, first + step - 1, j, N), 1.0)
        alpha = v * G_bar
        G_sum += G_bar
        F_bar = own - a * u * tl.sum(D * alpha[None, :], 1)
        own = tl.zeros_like(own)
        F_sum += F_bar
        beta = u * F_bar
        total += D * ((a * u)[:, None] * alpha[None, :] + beta[:, None] * (b * v_before)[None, :])
        G_bar = -b * v_before * tl.sum(D * beta[:, None], 0)
        # It sums to 0, and what rounding leaves of the sum would stay, in the direction of b, through all steps before.
        G_bar -= b * (tl.sum(G_bar, 0) / mass)
        step -= 1
        v = v_before
        u = tl.full([R], 1.0, a.dtype)
        if step > 0:
            u = tl.where(a != 0, side(row_history_ptr, first + step, i, M), 1.0)
            if fresh:
                v = tl.where(b != 0, side(column_history_ptr, first + step, j, N), 1.0)
                F, G = side(row_base_ptr, first + step, i, M), side(column_base_ptr, first + step, j, N)
                costs = cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride)
                D = density(costs, lowest, scale, F, G)
    G_sum += G_bar
    F_bar = own - a * tl.sum(D * G_bar[None, :], 1)
    F_sum += F_bar
    costs = cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride)
    F = side(row_base_ptr, first, i, M)
    total += D * (a[:, None] * G_bar[None, :]) + F_bar[:, None] * tl.exp2(exponent(costs, lowest, scale, F))
    put(grad_a_ptr, problem, i, M, tl.where(a != 0, F_sum / tl.where(a != 0, a, 1.0), 0.0))
    put(grad_b_ptr, problem, j, N, tl.where(b != 0, G_sum / tl.where(b != 0, b, 1.0), 0.0))
    at = (problem * M + i)[:, None] * N + j[None, :]
    total = tl.where((a != 0)[:, None] & (b != 0)[None, :], total / epsilon, 0.0)
    tl.store(grad_cost_ptr + at, total, mask=(i < M)[:, None] & (j < N)[None, :])


def differentiate(
    upstream: tuple[Tensor, Tensor, Tensor],
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    column_weight: Tensor | None,
    done: Tensor,
    histories: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, ...],
    epsilon: float,
    iterations: int,
    domain: str,
    return_plan: bool,
) -> None:
    """Fills ``gradients``, those of the operator."""
    B, M, N = cost.shape
    bases = tuple(torch.empty_like(history) for history in histories)
    fresh = cost.new_empty(B, iterations, dtype=torch.int8)
    where = (*cost.stride(), M, N, iterations, bits_of(epsilon))
    _bases[(B,)](
        cost,
        a,
        b,
        done,
        *histories,
        *bases,
        fresh,
        *where,
        DOMAIN=DOMAINS[domain],
        **launch_of(cost, "transport_resident_adjoint.bases"),
    )
    _differentiate[(B,)](
        *upstream,
        cost,
        a,
        b,
        column_weight,
        done,
        *histories,
        *bases,
        fresh,
        *gradients,
        *where,
        bits_of(LOG2E / epsilon),
        PLAN=return_plan,
        **launch_of(cost, "transport_resident_adjoint.differentiate"),
    )
