"""What the Triton kernels of entropic transport share: a problem's marginals, a tile of its cost, its gradient by P.

Everything is made of densities D = P / (a b^T) = 2^(F + X + G) with X = (lowest - C) log2(e) / epsilon. ``lowest`` is
the problem's lowest cost: the difference comes first, so that an offset of the costs rounds nothing. Of the
definition's log-scalings F lacks log2 a and ``lowest``, G lacks log2 b; then no term of the steps, of the values or of
the gradients divides by a marginal:

    u = 1 / (D (b v))        v = 1 / (D^T (a u))        KL(P | a b^T) = sum P log D

Step 1 runs on logarithms; it makes the base (F, G) of the first D. u and v of later steps are relative to their base,
and a step that opens a new one takes them in: F += log2 u, G += log2 v. What does not count has a or b 0 and a cost of
+inf, hence D = 0.

The histories hold F and G in the place of step 1 and u and v in those of the later steps.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.checks import accumulator
from mlot_kernels.triton_rows import bits_of, double_of
from mlot_kernels.triton_tiles import launch_options

LOG2E = 1 / math.log(2)
_LOG2E: tl.constexpr = tl.constexpr(LOG2E)


@triton.jit
def _length(lengths_ptr, problem, size):
    length = size
    if lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + problem), 0), size).to(tl.int32)
    return length


@triton.jit
def _counted(marginal_ptr, start, length, acc: tl.constexpr, BLOCK: tl.constexpr):
    """The weights ``[BLOCK]`` of one side before it is normalised; 0 where nothing counts."""
    at = start + tl.arange(0, BLOCK)
    weight = (at < length).to(acc)
    if marginal_ptr is not None:
        weight = tl.load(marginal_ptr + at, mask=at < length, other=0).to(acc)
    return weight


@triton.jit
def _count(marginal_ptr, length, size, acc: tl.constexpr, BLOCK: tl.constexpr):
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        count += (_counted(marginal_ptr, start, length, acc, BLOCK) != 0).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _write_side(out_ptr, marginal_ptr, length, size, each, acc: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        weight = _counted(marginal_ptr, start, length, acc, BLOCK)
        tl.store(out_ptr + at, weight * each, mask=at < size)


@triton.jit
def _marginals(
    row_marginal_ptr,
    column_marginal_ptr,
    row_lengths_ptr,
    column_lengths_ptr,
    a_ptr,
    b_ptr,
    M,
    N,
    UNIT: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one problem: writes a ``[M]`` and b ``[N]``, 0 where nothing counts, all of them where either side has none.

    "unit": a = n / m keeps the scalings from drifting by (m / n)^l; the last step gives the same plan.
    """
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    problem = tl.program_id(0).to(tl.int64)
    if row_marginal_ptr is not None:
        row_marginal_ptr += problem * M
        column_marginal_ptr += problem * N
    rows = _length(row_lengths_ptr, problem, M)
    columns = _length(column_lengths_ptr, problem, N)
    m = _count(row_marginal_ptr, rows, M, acc, BLOCK)
    n = _count(column_marginal_ptr, columns, N, acc, BLOCK)
    rows = tl.where(n > 0, rows, 0)
    columns = tl.where(m > 0, columns, 0)
    each_row = tl.full([], 1.0, tl.float64)
    each_column = tl.full([], 1.0, tl.float64)
    if row_marginal_ptr is None:
        each_row = (n if UNIT else 1) / tl.maximum(m, 1).to(tl.float64)
        if not UNIT:
            each_column = 1 / tl.maximum(n, 1).to(tl.float64)
    _write_side(a_ptr + problem * M, row_marginal_ptr, rows, M, each_row.to(acc), acc, BLOCK)
    _write_side(b_ptr + problem * N, column_marginal_ptr, columns, N, each_column.to(acc), acc, BLOCK)


def marginals_of(
    cost: Tensor,
    row_marginal: Tensor | None,
    column_marginal: Tensor | None,
    row_lengths: Tensor | None,
    column_lengths: Tensor | None,
    marginals: str,
) -> tuple[Tensor, Tensor]:
    """a ``[B, M]`` and b ``[B, N]``, 0 where nothing counts, in the accumulator's dtype."""
    B, M, N = cost.shape
    wide = accumulator(cost.dtype)
    a, b = cost.new_empty(B, M, dtype=wide), cost.new_empty(B, N, dtype=wide)
    if B and M + N:
        _marginals[(B,)](
            *(None if x is None else x.contiguous() for x in (row_marginal, column_marginal)),
            *(None if x is None else x.contiguous() for x in (row_lengths, column_lengths)),
            a,
            b,
            M,
            N,
            UNIT=marginals == "unit",
            DOUBLE=wide == torch.float64,
            **launch_options("transport.marginals", cost.device),
        )
    return a, b


# One tile: vectors of rows are [R], of columns [C]


@triton.jit
def side(ptr, problem, at, size):
    """One vector of a problem ``[.., size]``, 0 beyond it."""
    return tl.load(ptr + problem * size + at, mask=at < size, other=0)


@triton.jit
def put(ptr, problem, at, size, value):
    tl.store(ptr + problem * size + at, value, mask=at < size)


@triton.jit
def cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride):
    """``[R, C]`` in the accumulator's dtype, +inf where nothing counts, which is not read."""
    at = i.to(tl.int64)[:, None] * row_stride + j.to(tl.int64)[None, :] * column_stride
    counted = (a != 0)[:, None] & (b != 0)[None, :]
    return tl.load(cost_ptr + at, mask=counted, other=float("inf")).to(a.dtype)


@triton.jit
def exponent(C, lowest, scale, F):
    """F + X. Always rounded in this way: backward must make every D to the bit as forward did."""
    return tl.fma(lowest - C, scale, F[:, None])


@triton.jit
def density(C, lowest, scale, F, G):
    return tl.exp2(exponent(C, lowest, scale, F) + G[None, :])


@triton.jit
def shift_of(peak):
    """What terms up to ``peak`` are made relative to: -inf less -inf would be NaN where there is merely nothing."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def reciprocal(total, marginal):
    """1 / total; 1 where nothing counts."""
    return tl.where(marginal != 0, 1 / tl.where(marginal != 0, total, 1.0), 1.0)


@triton.jit
def carried_only(P, x):
    """``x`` where something is carried (or P is NaN), else 0: infinite costs count nothing there."""
    return tl.where(P != 0, x, 0.0)


@triton.jit
def by_plan(P, C, F, G, weight, extra, transported, regularized, lowest, epsilon, unit):
    """S = P dl/dP ``[R, C]``. In that of the regularised cost C cancels against X in log P."""
    W = transported * weight[None, :] * C + regularized * ((lowest + epsilon) + unit * (F[:, None] + G[None, :]))
    return carried_only(P, P * (W + extra))


@triton.jit
def upstream_tile(grad_plan_ptr, i, j, M, N, PLAN: tl.constexpr, like):
    """The gradient of the plan ``[R, C]``, 0 where there is none."""
    extra = tl.zeros_like(like)
    if PLAN:
        at = i.to(tl.int64)[:, None] * N + j[None, :]
        extra = tl.load(grad_plan_ptr + at, mask=(i < M)[:, None] & (j < N)[None, :], other=0)
    return extra


@triton.jit
def weight_of(weight_ptr, problem, j, b, N):
    """The column weights ``[C]``, 1 where none are given and 0 where nothing counts."""
    weight = (b != 0).to(b.dtype)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + problem * N + j, mask=b != 0, other=0).to(b.dtype)
    return weight


@triton.jit
def _envelope(
    regularized_ptr,
    cost_ptr,
    a_ptr,
    b_ptr,
    row_potential_ptr,
    column_potential_ptr,
    out_ptr,
    batch_stride,
    row_stride,
    column_stride,
    M,
    N,
    epsilon_bits,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Owns one tile of one problem: reads its cost, writes P times the upstream gradient."""
    slabs = (M + R - 1) // R
    problem = (tl.program_id(0) // slabs).to(tl.int64)
    i = (tl.program_id(0) % slabs) * R + tl.arange(0, R)
    j = tl.program_id(1) * C + tl.arange(0, C)
    a, b = side(a_ptr, problem, i, M), side(b_ptr, problem, j, N)
    C_ij = cost_tile(cost_ptr + problem * batch_stride, i, j, a, b, row_stride, column_stride)
    f, g = side(row_potential_ptr, problem, i, M), side(column_potential_ptr, problem, j, N)
    scale = (1 / double_of(epsilon_bits) * _LOG2E).to(a.dtype)
    P = tl.exp2(((f[:, None] - C_ij) + g[None, :]) * scale)
    at = (problem * M + i)[:, None] * N + j[None, :]
    P = tl.where((a != 0)[:, None] & (b != 0)[None, :], P * tl.load(regularized_ptr + problem), 0.0)
    tl.store(out_ptr + at, P, mask=(i < M)[:, None] & (j < N)[None, :])


def envelope(
    grad_regularized: Tensor,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    row_potential: Tensor,
    column_potential: Tensor,
    out: Tensor,
    epsilon: float,
) -> None:
    """dregularized/dC = P, from the potentials, into ``out`` ``[B, M, N]``."""
    B, M, N = cost.shape
    launch = dict(launch_options("transport.envelope", cost.device))
    C = min(triton.next_power_of_2(max(N, 1)), 256)
    R = launch.pop("TILE") // C
    if out.numel():
        _envelope[(B * triton.cdiv(M, R), triton.cdiv(N, C))](
            grad_regularized.contiguous(),
            cost,
            a,
            b,
            row_potential,
            column_potential,
            out,
            *cost.stride(),
            M,
            N,
            bits_of(epsilon),
            R=R,
            C=C,
            **launch,
        )
