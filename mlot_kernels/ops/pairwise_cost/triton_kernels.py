"""pairwise_cost on a GPU: tiles of pairs forward, tiles of one side's gradient backward, in registers.

Both sides are widened, made ready for the metric and laid out anew first, as on a CPU: what depends on one side alone
is done once, strides no longer matter, and the loops over terms load whole vectors without a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.checks import accumulator
from mlot_kernels.ops.pairwise_cost.reference import SMALLEST_NORM
from mlot_kernels.ops.pairwise_cost.triton_sides import ALIGNMENT, Side, narrow, quotient, side, square_root
from mlot_kernels.triton_tiles import launch_options

TERMS = 64  # terms that are added one after the other; their sums are added then

_SMALLEST_NORM: tl.constexpr = tl.constexpr(SMALLEST_NORM)
_ANY_FINITE: tl.constexpr = tl.constexpr(-1e30)
# Together they raise the smallest float32 to 1; one such factor would not be finite.
_RAISE: tl.constexpr = tl.constexpr(2.0**127)
_RAISE_AGAIN: tl.constexpr = tl.constexpr(2.0**22)


# Costs


@triton.jit
def _zeros(ptr, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros ``[ROWS, COLUMNS]`` that lie in the threads as a load of them would: four neighbouring columns in each.

    It is a load of nothing. Sums that start from ``tl.zeros`` have one column in a thread, which then reads 17 numbers
    for 16 terms instead of 8.
    """
    none = tl.arange(0, ROWS) < tl.minimum(stride, 0)
    place = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    return tl.load(ptr + place, mask=none[:, None], other=0.0)


@triton.jit
def _term(x_ptr, y_ptr, METRIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What one feature of the rows and of the columns adds, ``[ROWS, COLUMNS]``."""
    acc: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + tl.arange(0, ROWS))
    y = tl.load(y_ptr + tl.arange(0, COLUMNS))[None, :]
    if METRIC == "cosine":
        term = x[:, None] * y
    elif METRIC == "cross_entropy":
        # Where x is 0, the log of 0 counts as any finite number.
        least = tl.where(x == 0, tl.full([], _ANY_FINITE, acc), float("-inf"))
        term = x[:, None] * tl.maximum(least[:, None], y, propagate_nan=tl.PropagateNan.ALL)
    else:
        difference = x[:, None] - y
        term = tl.abs(difference) if METRIC == "l1" else difference * difference
    return term


@triton.jit
def _costs(
    x_ptr,
    y_ptr,
    grad_ptr,
    out_ptr,
    rows,
    columns,
    width,
    x_stride,
    y_stride,
    METRIC: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Owns a tile of ``[B, rows, columns]``: reads the features of its rows and columns, writes its costs.

    Where ``grad_ptr`` is not None it writes the upstream gradient divided by the cost, where that is not 0. A cost is
    the sum of sums of TERMS features, and depends on its two vectors alone.
    """
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    problem = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    first_row = tile // tl.cdiv(columns, COLUMNS) * ROWS
    first_column = tile % tl.cdiv(columns, COLUMNS) * COLUMNS
    x_ptr += problem * width * x_stride + first_row
    y_ptr += problem * width * y_stride + first_column
    total = _zeros(y_ptr, y_stride, ROWS, COLUMNS)
    part = total
    for d in tl.range(0, width, loop_unroll_factor=2):
        part += _term(x_ptr, y_ptr, METRIC, ROWS, COLUMNS)
        x_ptr += x_stride
        y_ptr += y_stride
        if d % TERMS == TERMS - 1:
            total += part
            part = tl.zeros([ROWS, COLUMNS], part.dtype)
    total += part
    if METRIC == "l2":
        total = square_root(total, DOUBLE)
    elif METRIC == "cosine":
        total = 1 - total
    elif METRIC == "cross_entropy":
        total = -total
    i = first_row + tl.arange(0, ROWS)
    j = first_column + tl.arange(0, COLUMNS)
    at = (problem * rows + i.to(tl.int64))[:, None] * columns + j[None, :]
    exists = (i < rows)[:, None] & (j < columns)[None, :]
    if grad_ptr is not None:
        grad = tl.load(grad_ptr + at, mask=exists, other=0)
        total = quotient(grad, tl.where(total == 0, 1.0, total), DOUBLE)
    tl.store(out_ptr + at, total, mask=exists)


def _pairs(x: Tensor, y: Tensor, metric: str, grad: Tensor | None) -> Tensor:
    """The costs ``[B, M, N]``; or ``grad`` divided by them."""
    (B, M, D), N = x.shape, y.shape[1]
    wide = accumulator(torch.promote_types(x.dtype, y.dtype))
    out = x.new_empty(B, M, N, dtype=wide)
    if out.numel():
        own = side(x, metric, wide, neighbours="rows").ready
        other = side(y, metric, wide, neighbours="rows", log=metric == "cross_entropy").ready
        launch = launch_options("pairwise_cost.costs", x.device)
        _costs[(B * triton.cdiv(M, launch["ROWS"]) * triton.cdiv(N, launch["COLUMNS"]),)](
            own,
            other,
            grad,
            out,
            M,
            N,
            D,
            own.shape[2],
            other.shape[2],
            METRIC=metric,
            DOUBLE=wide == torch.float64,
            TERMS=TERMS,
            **launch,
        )
    return out


def forward(x: Tensor, y: Tensor, metric: str) -> Tensor:
    return _pairs(x, y, metric, None)


# The gradient


@triton.jit
def _sign(x):
    """-1, 0 or 1; NaN of NaN. Numbers below the normal ones have a sign, too."""
    if x.dtype == tl.float64:  # which `clamp` does not compile for
        sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
    else:  # one instruction each, half of what comparisons take
        raised = tl.clamp(x * _RAISE, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        sign = tl.clamp(raised * _RAISE_AGAIN, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return sign


@triton.jit
def _passed_on(own, other_ptr, weight_ptrs, METRIC: tl.constexpr, OF_X: tl.constexpr):
    """What one row of the other side passes on to ``own`` ``[ROWS, FEATURES]``.

    ``weight_ptrs`` ``[ROWS]`` point to its pairs' weights.
    """
    acc: tl.constexpr = own.dtype
    weight = tl.load(weight_ptrs)
    other = tl.load(other_ptr + tl.arange(0, own.shape[1]))[None, :]
    if METRIC == "cosine":
        passed = weight[:, None] * other
    elif METRIC == "cross_entropy":
        nothing = (weight == 0)[:, None]
        if OF_X:  # `other` are logs: those of 0 pass nothing on to where x or the weight is 0
            gone = (nothing | (own == 0)) & (other == float("-inf"))
            passed = weight[:, None] * tl.where(gone, 0.0, other)
        else:  # divided by y at the end, where it is a number and not 0
            factor = tl.where(own == 0, tl.full([], float("inf"), acc), tl.where(own == own, 1.0, own))
            passed = tl.where(nothing | (other == 0), 0.0, weight[:, None] * other * factor)
    else:
        difference = own - other
        passed = weight[:, None] * (_sign(difference) if METRIC == "l1" else difference)
    return passed


@triton.jit
def _gradient(
    own_ptr,
    other_ptr,
    weight_ptr,
    out_ptr,
    rows,
    others,
    width,
    filled_width,
    out_width,
    weight_row_stride,
    weight_other_stride,
    METRIC: tl.constexpr,
    OF_X: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Owns a tile of one side's gradient ``[B, rows, out_width]``: reads its features, all of the other side's, and the
    weights of all their pairs; writes the sums. Those of ``cosine`` are not yet the gradient.

    A sum is one of sums of TERMS rows of the other side, in their order.
    """
    tiles = tl.cdiv(rows, ROWS)
    problem = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(i, rows - 1).to(tl.int64)
    first = tl.program_id(1) * FEATURES
    d = first + tl.arange(0, FEATURES)
    own = tl.load(own_ptr + (problem * rows + row)[:, None] * filled_width + d[None, :])
    other_ptr += problem * others * filled_width + first
    weight_ptrs = weight_ptr + problem * rows * others + row * weight_row_stride
    total = _zeros(other_ptr, filled_width, ROWS, FEATURES)
    part = total
    for j in tl.range(0, others, loop_unroll_factor=2):
        part += _passed_on(own, other_ptr, weight_ptrs, METRIC, OF_X)
        other_ptr += filled_width
        weight_ptrs += weight_other_stride
        if j % TERMS == TERMS - 1:
            total += part
            part = tl.zeros([ROWS, FEATURES], part.dtype)
    total += part
    if METRIC == "sqeuclidean":
        total = 2 * total
    elif METRIC == "cross_entropy":
        total = -total if OF_X else -total / tl.where((own == 0) | (own != own), 1.0, own)
    out_ptr += (problem * rows + row)[:, None] * out_width + d[None, :]
    tl.store(out_ptr, narrow(total, out_ptr.dtype.element_ty), mask=(i < rows)[:, None] & (d < out_width)[None, :])


@triton.jit
def _project(
    sums_ptr,
    unit_ptr,
    norm_ptr,
    out_ptr,
    rows,
    width,
    filled_width,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Owns ROWS rows of ``cosine``'s gradient: reads their unit vectors and sums ``[rows, filled_width]`` twice.

    What is along the unit vector leaves the sums, but below the smallest norm; the rest is divided by the norm.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.minimum(i, rows - 1).to(tl.int64)[:, None]
    norm = tl.load(norm_ptr + at)  # [ROWS, 1]
    features = tl.arange(0, FEATURES)[None, :]
    products = tl.zeros([ROWS, FEATURES], norm.dtype)
    for start in range(0, filled_width, FEATURES):  # both are 0 behind the last feature
        place = at * filled_width + start + features
        products += tl.load(unit_ptr + place) * tl.load(sums_ptr + place)
    along = tl.where(norm <= tl.full([], _SMALLEST_NORM, norm.dtype), 0.0, tl.sum(products, 1)[:, None])
    for start in range(0, width, FEATURES):
        place = at * filled_width + start + features
        rest = tl.load(unit_ptr + place) * along - tl.load(sums_ptr + place)
        rest = quotient(rest, tl.broadcast_to(norm, [ROWS, FEATURES]), DOUBLE)
        exists = (i < rows)[:, None] & (start + features < width)
        tl.store(out_ptr + at * width + start + features, narrow(rest, out_ptr.dtype.element_ty), mask=exists)


def _gradient_of(values: Tensor, own: Side, other: Side, weight: Tensor, metric: str, *, of_x: bool) -> Tensor:
    """The gradient of one side, ``values``; ``weight`` ``[B, M, N]``."""
    B, rows, D = values.shape
    if other.ready.shape[1] == 0:
        return values.new_zeros(B, rows, D)
    out = values.new_empty(B, rows, D)
    filled = own.ready.shape[2]
    projected = metric == "cosine"
    sums = own.ready.new_empty(own.ready.shape) if projected else out
    strides = (weight.shape[2], 1) if of_x else (1, weight.shape[2])
    out_width = filled if projected else D
    if out.numel():
        launch = launch_options("pairwise_cost.gradient", values.device)
        _gradient[(B * triton.cdiv(rows, launch["ROWS"]), triton.cdiv(D, launch["FEATURES"]))](
            own.ready,
            other.ready,
            weight,
            sums,
            rows,
            other.ready.shape[1],
            D,
            filled,
            out_width,
            *strides,
            METRIC=metric,
            OF_X=of_x,
            TERMS=TERMS,
            **launch,
        )
    if out.numel() and projected:
        launch = launch_options("pairwise_cost.project", values.device)
        _project[(triton.cdiv(B * rows, launch["ROWS"]),)](
            sums,
            own.ready,
            own.norm,
            out,
            B * rows,
            D,
            filled,
            DOUBLE=weight.dtype == torch.float64,
            FEATURES=ALIGNMENT,
            **launch,
        )
    return out


def backward(grad: Tensor, x: Tensor, y: Tensor, metric: str, x_needed: bool, y_needed: bool) -> tuple[Tensor, Tensor]:
    """The gradients; a side that is not needed comes back empty."""
    weight = _pairs(x, y, metric, grad.contiguous()) if metric == "l2" else grad.contiguous()

    def ready(values: Tensor, log: bool = False) -> Side:
        return side(values, metric, weight.dtype, neighbours="features", log=log)

    of_x, of_y = ready(x), ready(y)
    grad_x, grad_y = x.new_empty(0), y.new_empty(0)
    if x_needed:
        other = ready(y, log=True) if metric == "cross_entropy" else of_y
        grad_x = _gradient_of(x, of_x, other, weight, metric, of_x=True)
    if y_needed:
        grad_y = _gradient_of(y, of_y, of_x, weight, metric, of_x=False)
    return grad_x, grad_y
