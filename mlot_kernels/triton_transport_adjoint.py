"""The steps of ``triton_transport_streamed`` in reverse: a launch a step, then one that makes dl/dC of all steps.

With G_bar = dl/dG after a step, F_bar = dl/dF, alpha = v G_bar and beta = u F_bar (README of sinkhorn), a step adds
D o (a u alpha^T + beta b^T) to epsilon dl/dC, with its own D.
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
from mlot_kernels.triton_transport_slabs import Sizes, added_up, lowest_costs, lowest_of, owns, slab_of

_LOG2E: tl.constexpr = tl.constexpr(LOG2E)


@triton.jit
def _bases(marginal_ptr, done_ptr, history_ptr, base_ptr, size, iterations, BLOCK: tl.constexpr):
    """Owns BLOCK rows or columns of one problem: writes the base of each of its steps, as forward had it.

    The first step's place holds its own F or G, which is also the second one's base.
    """
    problem = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    counts = side(marginal_ptr, problem, at, size) != 0
    first = problem * iterations
    base = side(history_ptr, first, at, size)
    put(base_ptr, first, at, size, base)
    for step in range(1, tl.load(done_ptr + problem).to(tl.int32)):
        put(base_ptr, first + step, at, size, base)
        base += tl.where(counts, tl.log2(side(history_ptr, first + step, at, size)), 0.0)


@triton.jit
def _scaling(history_ptr, place, step, at, size, marginal):
    """u or v of one step, 1 in the first and where nothing counts."""
    scaling = tl.load(history_ptr + place * size + at, mask=(at < size) & (marginal != 0), other=1.0)
    return tl.where(step > 0, scaling, 1.0)


@triton.jit
def _plan_gradient(
    C_ij, a, b, F, G, u, v, weight, extra, transported, regularized, lowest, epsilon, unit, scale
):  # fmt: skip
    """P and S = P dl/dP, from the last step's base and scalings."""
    P = density(C_ij, lowest, scale, F, G) * (a * u)[:, None] * (b * v)[None, :]
    F_last, G_last = F + tl.log2(u), G + tl.log2(v)
    S = by_plan(P, C_ij, F_last, G_last, weight, extra, transported, regularized, lowest, epsilon, unit)
    return P, S


@triton.jit
def _begin(
    transported_ptr, regularized_ptr, grad_plan_ptr, cost_ptr, a_ptr, b_ptr, weight_ptr, extent_ptr, done_ptr,
    row_history_ptr, column_history_ptr, row_base_ptr, column_base_ptr, own_ptr, F_sum_ptr, parts_ptr, moved_part_ptr,
    batch_stride, row_stride, column_stride, M, N, problems, iterations, epsilon_bits, scale_bits,
    PLAN: tl.constexpr, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Owns one slab: writes S 1 of its rows, and its parts of S^T 1 and of the columns' transported cost."""
    problem, slab, slabs, place = slab_of(M, S)
    acc: tl.constexpr = a_ptr.dtype.element_ty
    cost_ptr += problem * batch_stride
    epsilon, scale = double_of(epsilon_bits).to(acc), double_of(scale_bits).to(acc)
    unit = (double_of(epsilon_bits) / _LOG2E).to(acc)
    lowest = lowest_of(extent_ptr, problem, slabs, 64)
    transported, regularized = tl.load(transported_ptr + problem), tl.load(regularized_ptr + problem)
    done = tl.load(done_ptr + problem)
    last = done.to(tl.int32) - 1
    parts_ptr += done % 2 * problems * slabs * N
    at_last = problem * iterations + last
    S_columns = tl.zeros([C], acc)
    moved_columns = tl.zeros([C], acc)
    for tile in range(0, S, R):
        i = slab * S + tile + tl.arange(0, R)
        a = side(a_ptr, problem, i, M)
        F, u = side(row_base_ptr, at_last, i, M), _scaling(row_history_ptr, at_last, last, i, M, a)
        own = tl.zeros([R], acc)
        mass = tl.zeros([R], acc)
        for start in range(0, N, C):
            j = start + tl.arange(0, C)
            b = side(b_ptr, problem, j, N)
            G, v = side(column_base_ptr, at_last, j, N), _scaling(column_history_ptr, at_last, last, j, N, b)
            costs = cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride)
            extra = upstream_tile(grad_plan_ptr + problem * M * N, i, j, M, N, PLAN, costs)
            weight = weight_of(weight_ptr, problem, j, b, N)
            P, W = _plan_gradient(
                costs, a, b, F, G, u, v, weight, extra, transported, regularized, lowest, epsilon, unit, scale
            )
            own += tl.sum(W, 1)
            mass += tl.sum(P, 1)
            S_part, moved_part = tl.sum(W, 0), tl.sum(carried_only(P, P * costs), 0)
            if WHOLE:
                S_columns += S_part
                moved_columns += moved_part
            else:
                put(parts_ptr, place, j, N, S_part)
                put(moved_part_ptr, place, j, N, moved_part)
        put(own_ptr, problem, i, M, own)
        put(F_sum_ptr, problem, i, M, -epsilon * regularized * mass)
    if WHOLE:
        put(parts_ptr, place, tl.arange(0, C), N, S_columns)
        put(moved_part_ptr, place, tl.arange(0, C), N, moved_columns)


@triton.jit
def _upstream_of_columns(part_ptr, problem, slabs, j, b, N, is_last, R: tl.constexpr):
    """G_bar ``[C]`` of one step, of the parts that the step after left."""
    G_bar = added_up(part_ptr, problem, slabs, j, N, R, b)
    return tl.where(is_last, G_bar, -b * G_bar)


@triton.jit
def _share(b_ptr, part_ptr, problem, slabs, N, is_last, R: tl.constexpr, C: tl.constexpr):
    """What a column's b is multiplied with to be taken off G_bar.

    G_bar sums to 0 but for the last step's, and what rounding leaves of the sum would stay, in the direction of b,
    through all steps before.
    """
    drift = tl.zeros([C], b_ptr.dtype.element_ty)
    mass = tl.zeros([C], b_ptr.dtype.element_ty)
    for start in range(0, N, C):
        j = start + tl.arange(0, C)
        b = side(b_ptr, problem, j, N)
        drift += _upstream_of_columns(part_ptr, problem, slabs, j, b, N, is_last, R)
        mass += b
    whole = tl.sum(mass, 0)
    return tl.where(is_last, 0.0, tl.sum(drift, 0) / tl.where(whole == 0, 1.0, whole))


@triton.jit
def _write_columns(
    transported_ptr, regularized_ptr, b_ptr, moved_part_ptr, G_sum_ptr, alpha_ptr, grad_b_ptr, grad_weight_ptr,
    problem, slabs, place, j, b, G_bar, alpha, N, step, is_last, epsilon, R: tl.constexpr,
):  # fmt: skip
    """What all slabs' programs make of columns ``j`` in a step: alpha, the sum of G_bar, and at its end gradients."""
    put(alpha_ptr, place, j, N, alpha)
    G_sum = side(G_sum_ptr, problem, j, N)
    if is_last:  # KL's own dependence on the marginals, beside that through the plan
        G_sum = -epsilon * tl.load(regularized_ptr + problem) * b
        moved = added_up(moved_part_ptr, problem, slabs, j, N, R, b)
        put(grad_weight_ptr, problem, j, N, tl.load(transported_ptr + problem) * moved)
    G_sum += G_bar
    put(G_sum_ptr, problem, j, N, G_sum)
    if step == 0:
        put(grad_b_ptr, problem, j, N, tl.where(b != 0, G_sum / tl.where(b != 0, b, 1.0), 0.0))


@triton.jit
def _back_rows(own_ptr, F_sum_ptr, beta_ptr, grad_a_ptr, problem, place, i, a, u, met, M, step, is_last):
    """beta ``[R]`` of one step; writes it, the sum of F_bar, and at the end the gradient."""
    F_bar = -a * u * met
    if is_last:
        F_bar += side(own_ptr, problem, i, M)
    F_sum = side(F_sum_ptr, problem, i, M) + F_bar
    put(F_sum_ptr, problem, i, M, F_sum)
    put(beta_ptr, place, i, M, u * F_bar)
    if step == 0:
        put(grad_a_ptr, problem, i, M, tl.where(a != 0, F_sum / tl.where(a != 0, a, 1.0), 0.0))
    return u * F_bar


@triton.jit
def _sweep_back(
    cost_ptr, a_ptr, row_history_ptr, row_base_ptr, own_ptr, F_sum_ptr, beta_ptr, grad_a_ptr, problem, place,
    first_row, j, b, G, alpha, lowest, scale, row_stride, column_stride, M, step, is_last,
    S: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A step's work on the S rows from ``first_row`` on, in tiles of whole ones; returns their D^T beta ``[C]``."""
    parts = tl.zeros([R, C], b.dtype)
    for tile in range(0, S, R):
        i = first_row + tile + tl.arange(0, R)
        a = side(a_ptr, problem, i, M)
        F, u = side(row_base_ptr, place, i, M), _scaling(row_history_ptr, place, step, i, M, a)
        D = density(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), lowest, scale, F, G)
        met = tl.sum(D * alpha[None, :], 1)
        beta = _back_rows(own_ptr, F_sum_ptr, beta_ptr, grad_a_ptr, problem, place, i, a, u, met, M, step, is_last)
        parts += D * beta[:, None]
    return tl.sum(parts, 0)


@triton.jit
def _all_back(
    transported_ptr, regularized_ptr, cost_ptr, a_ptr, b_ptr, extent_ptr, done_ptr, row_history_ptr,
    column_history_ptr, row_base_ptr, column_base_ptr, own_ptr, F_sum_ptr, parts_ptr, moved_part_ptr, alpha_ptr,
    beta_ptr, grad_a_ptr, grad_b_ptr, grad_weight_ptr, batch_stride, row_stride, column_stride, M, N, problems,
    iterations, epsilon_bits, scale_bits, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Owns one problem that is one slab: goes back over all its steps. Columns stay in registers."""
    problem = tl.program_id(0).to(tl.int64)
    acc: tl.constexpr = a_ptr.dtype.element_ty
    cost_ptr += problem * batch_stride
    epsilon, scale = double_of(epsilon_bits).to(acc), double_of(scale_bits).to(acc)
    lowest = tl.load(extent_ptr + problem)
    done = tl.load(done_ptr + problem)
    step = done.to(tl.int32) - 1
    last = step
    j = tl.arange(0, C)
    b = side(b_ptr, problem, j, N)
    mass = tl.sum(b, 0)
    mass = tl.where(mass == 0, 1.0, mass)
    G_bar = side(parts_ptr + done % 2 * problems * N, problem, j, N)
    G_sum = -epsilon * tl.load(regularized_ptr + problem) * b  # KL's own dependence on the marginals
    moved = side(moved_part_ptr, problem, j, N)
    put(grad_weight_ptr, problem, j, N, tl.load(transported_ptr + problem) * moved)
    while step >= 0:
        place = problem * iterations + step
        G, v = side(column_base_ptr, place, j, N), _scaling(column_history_ptr, place, step, j, N, b)
        G_sum += G_bar
        put(alpha_ptr, place, j, N, v * G_bar)
        sums = _sweep_back(
            cost_ptr, a_ptr, row_history_ptr, row_base_ptr, own_ptr, F_sum_ptr, beta_ptr, grad_a_ptr, problem, place,
            0, j, b, G, v * G_bar, lowest, scale, row_stride, column_stride, M, step, step == last, S, R, C,
        )  # fmt: skip
        G_bar = -b * sums
        G_bar -= b * (tl.sum(G_bar, 0) / mass)  # as in `_share`
        step -= 1
        tl.debug_barrier()  # the next step's threads read what others wrote of F_sum
    put(grad_b_ptr, problem, j, N, tl.where(b != 0, G_sum / tl.where(b != 0, b, 1.0), 0.0))


@triton.jit(do_not_specialize=["step"])
def _back(
    transported_ptr, regularized_ptr, cost_ptr, a_ptr, b_ptr, extent_ptr, done_ptr, row_history_ptr,
    column_history_ptr, row_base_ptr, column_base_ptr, own_ptr, F_sum_ptr, G_sum_ptr, part_before_ptr, part_ptr,
    moved_part_ptr, alpha_ptr, beta_ptr, grad_a_ptr, grad_b_ptr, grad_weight_ptr,
    batch_stride, row_stride, column_stride, M, N, iterations, step, epsilon_bits, scale_bits,
    S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Owns one slab in step ``step`` (from 0), where the problem took it.

    It makes G_bar of all slabs' parts; writes its rows' beta and its part of D^T beta. Of what all slabs' programs make
    of the columns, each writes a share.
    """
    problem, slab, slabs, part = slab_of(M, S)
    acc: tl.constexpr = a_ptr.dtype.element_ty
    done = tl.load(done_ptr + problem).to(tl.int32)
    if step < done:
        is_last = step == done - 1
        cost_ptr += problem * batch_stride
        epsilon, scale = double_of(epsilon_bits).to(acc), double_of(scale_bits).to(acc)
        lowest = lowest_of(extent_ptr, problem, slabs, 64)
        share = _share(b_ptr, part_before_ptr, problem, slabs, N, is_last, R, C)
        place = problem * iterations + step
        if WHOLE:
            j = tl.arange(0, C)
            b = side(b_ptr, problem, j, N)
            G, v = side(column_base_ptr, place, j, N), _scaling(column_history_ptr, place, step, j, N, b)
            G_bar = _upstream_of_columns(part_before_ptr, problem, slabs, j, b, N, is_last, R) - share * b
            if slab == 0:
                _write_columns(
                    transported_ptr, regularized_ptr, b_ptr, moved_part_ptr, G_sum_ptr, alpha_ptr, grad_b_ptr,
                    grad_weight_ptr, problem, slabs, place, j, b, G_bar, v * G_bar, N, step, is_last, epsilon, R,
                )  # fmt: skip
            sums = _sweep_back(
                cost_ptr, a_ptr, row_history_ptr, row_base_ptr, own_ptr, F_sum_ptr, beta_ptr, grad_a_ptr, problem,
                place, slab * S, j, b, G, v * G_bar, lowest, scale, row_stride, column_stride, M, step, is_last,
                S, R, C,
            )  # fmt: skip
            put(part_ptr, part, j, N, sums)
        else:
            i = slab * S + tl.arange(0, R)
            a = side(a_ptr, problem, i, M)
            F, u = side(row_base_ptr, place, i, M), _scaling(row_history_ptr, place, step, i, M, a)
            met = tl.zeros([R], acc)
            for start in range(0, N, C):
                j = start + tl.arange(0, C)
                b = side(b_ptr, problem, j, N)
                G, v = side(column_base_ptr, place, j, N), _scaling(column_history_ptr, place, step, j, N, b)
                G_bar = _upstream_of_columns(part_before_ptr, problem, slabs, j, b, N, is_last, R) - share * b
                if owns(start, slab, slabs, C):
                    _write_columns(
                        transported_ptr, regularized_ptr, b_ptr, moved_part_ptr, G_sum_ptr, alpha_ptr, grad_b_ptr,
                        grad_weight_ptr, problem, slabs, place, j, b, G_bar, v * G_bar, N, step, is_last, epsilon, R,
                    )  # fmt: skip
                D = density(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), lowest, scale, F, G)
                met += tl.sum(D * (v * G_bar)[None, :], 1)
            beta = _back_rows(own_ptr, F_sum_ptr, beta_ptr, grad_a_ptr, problem, place, i, a, u, met, M, step, is_last)
            if step > 0:
                for start in range(0, N, C):
                    j = start + tl.arange(0, C)
                    b = side(b_ptr, problem, j, N)
                    G = side(column_base_ptr, place, j, N)
                    D = density(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), lowest, scale, F, G)
                    put(part_ptr, part, j, N, tl.sum(D * beta[:, None], 0))


@triton.jit
def _gradient(
    transported_ptr, regularized_ptr, grad_plan_ptr, cost_ptr, a_ptr, b_ptr, weight_ptr, extent_ptr, done_ptr,
    row_history_ptr, column_history_ptr, row_base_ptr, column_base_ptr, alpha_ptr, beta_ptr, out_ptr,
    batch_stride, row_stride, column_stride, M, N, iterations, slabs, epsilon_bits, scale_bits,
    PLAN: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Owns one tile of dl/dC: reads its costs once, adds what all steps leave there, one exp per element and step."""
    problem, tile, _, _ = slab_of(M, R)
    i = tile * R + tl.arange(0, R)
    a = side(a_ptr, problem, i, M)
    j = tl.program_id(1) * C + tl.arange(0, C)
    b = side(b_ptr, problem, j, N)
    epsilon, scale = double_of(epsilon_bits).to(a.dtype), double_of(scale_bits).to(a.dtype)
    unit = (double_of(epsilon_bits) / _LOG2E).to(a.dtype)
    lowest = lowest_of(extent_ptr, problem, slabs, 64)
    transported, regularized = tl.load(transported_ptr + problem), tl.load(regularized_ptr + problem)
    last = tl.load(done_ptr + problem).to(tl.int32) - 1
    place = problem * iterations + last
    costs = cost_tile(cost_ptr + problem * batch_stride, i, j, a, b, row_stride, column_stride)
    F, u = side(row_base_ptr, place, i, M), _scaling(row_history_ptr, place, last, i, M, a)
    G, v = side(column_base_ptr, place, j, N), _scaling(column_history_ptr, place, last, j, N, b)
    extra = upstream_tile(grad_plan_ptr + problem * M * N, i, j, M, N, PLAN, costs)
    weight = weight_of(weight_ptr, problem, j, b, N)
    P, S = _plan_gradient(
        costs, a, b, F, G, u, v, weight, extra, transported, regularized, lowest, epsilon, unit, scale
    )
    total = P * (epsilon * (transported * weight + regularized))[None, :] - S  # epsilon dl/dC
    first = problem * iterations
    for back in range(0, last):
        place = first + last - back
        F, u = side(row_base_ptr, place, i, M), side(row_history_ptr, place, i, M)
        beta, alpha = side(beta_ptr, place, i, M), side(alpha_ptr, place, j, N)
        D = density(costs, lowest, scale, F, side(column_base_ptr, place, j, N))
        total += D * ((a * u)[:, None] * alpha[None, :] + beta[:, None] * b[None, :])
    X = exponent(costs, lowest, scale, side(row_base_ptr, first, i, M))
    G = side(column_base_ptr, first, j, N)
    total += tl.exp2(X + G[None, :]) * (a[:, None] * side(alpha_ptr, first, j, N)[None, :])
    total += tl.exp2(X) * side(beta_ptr, first, i, M)[:, None]
    total = tl.where((a != 0)[:, None] & (b != 0)[None, :], total / epsilon, 0.0)
    at = (problem * M + i)[:, None] * N + j[None, :]
    tl.store(out_ptr + at, total, mask=(i < M)[:, None] & (j < N)[None, :])


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
    """Fills ``gradients``, those of the operator, of a problem whose steps each took the scalings into the base."""
    grad_cost, grad_a, grad_b, grad_weight = gradients
    sizes = Sizes(cost)
    B, M, N, slabs = sizes.B, sizes.M, sizes.N, sizes.slabs
    epsilon_bits, scale = bits_of(epsilon), bits_of(LOG2E / epsilon)
    bases = tuple(torch.empty_like(history) for history in histories)
    for marginal, history, base in zip((a, b), histories, bases, strict=True):
        launch = launch_options("transport_adjoint.bases", cost.device)
        size = history.shape[2]
        grid = (B, max(triton.cdiv(size, launch["BLOCK"]), 1))
        _bases[grid](marginal, done, history, base, size, iterations, **launch)
    extent = lowest_costs(cost, a, b, sizes)
    beta, alpha = (torch.empty_like(history) for history in histories)
    own, F_sum = a.new_empty(2, B, M).unbind()
    G_sum = torch.empty_like(b)
    parts, moved_part = a.new_empty(2, B, slabs, N), a.new_empty(B, slabs, N)
    steps = (*histories, *bases)
    _begin[sizes.rows](
        *upstream, cost, a, b, column_weight, extent, done, *steps, own, F_sum, parts, moved_part,
        *sizes.matrix, B, iterations, epsilon_bits, scale,
        PLAN=return_plan, **sizes.tiles("transport_adjoint.begin"),
    )  # fmt: skip
    if sizes.one_slab:
        _all_back[sizes.rows](
            *upstream[:2], cost, a, b, extent, done, *steps, own, F_sum, parts, moved_part, alpha, beta,
            grad_a, grad_b, grad_weight, *sizes.matrix, B, iterations, epsilon_bits, scale,
            **sizes.tiles("transport_adjoint.all_back"),
        )  # fmt: skip
    for step in () if sizes.one_slab else reversed(range(iterations)):
        _back[sizes.rows](
            *upstream[:2], cost, a, b, extent, done, *steps, own, F_sum, G_sum, parts[(step + 1) % 2], parts[step % 2],
            moved_part, alpha, beta, grad_a, grad_b, grad_weight, *sizes.matrix, iterations, step, epsilon_bits, scale,
            **sizes.tiles("transport_adjoint.back"),
        )  # fmt: skip
    launch = dict(launch_options("transport_adjoint.gradient", cost.device))
    elements = launch.pop("TILE") // (2 if sizes.double else 1)
    C = min(max(triton.next_power_of_2(max(N, 1)), 16), 128)
    R = elements // C
    if grad_cost.numel():
        _gradient[(B * triton.cdiv(M, R), triton.cdiv(N, C))](
            *upstream, cost, a, b, column_weight, extent, done, *steps, alpha, beta, grad_cost,
            *sizes.matrix, iterations, slabs, epsilon_bits, scale, PLAN=return_plan, R=R, C=C, **launch,
        )  # fmt: skip
