"""One side of pairwise_cost made ready for its metric: widened, laid out anew, as logs or unit vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.ops.pairwise_cost.reference import SMALLEST_NORM
from mlot_kernels.triton_tiles import launch_options

ALIGNMENT = 64  # to which rows or features are filled up: no tile is larger

_SMALLEST_NORM: tl.constexpr = tl.constexpr(SMALLEST_NORM)
_SMALLEST_SQUARE: tl.constexpr = tl.constexpr(SMALLEST_NORM**2)


@triton.jit
def square_root(x, DOUBLE: tl.constexpr):
    return tl.sqrt(x) if DOUBLE else tl.sqrt_rn(x)  # the plain one is an approximation in float32


@triton.jit
def quotient(x, y, DOUBLE: tl.constexpr):
    return x / y if DOUBLE else tl.div_rn(x, y)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """``x`` in a gradient's dtype; from float64 by way of float32, as Triton's interpreter knows no other."""
    if x.dtype == tl.float64 and dtype != tl.float64:
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def _prepare(
    values_ptr,
    out_ptr,
    norm_ptr,
    rows,
    width,
    span,
    batch_stride,
    row_stride,
    feature_stride,
    out_rows,
    out_features,
    out_batch_stride,
    out_row_stride,
    out_feature_stride,
    LOG: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Owns ``span`` features of ROWS rows of one problem: reads them and writes them widened, zeros behind the last.

    Their logs where LOG; where ``norm_ptr`` is not None unit vectors, and the rows' norms, those below the smallest
    norm as that one. Then a program owns all features and reads them twice.
    """
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    tiles = tl.cdiv(out_rows, ROWS)
    problem = (tl.program_id(0) // tiles).to(tl.int64)
    r = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    fits = r < out_rows
    features = tl.arange(0, FEATURES)
    values_ptr += problem * batch_stride + r.to(tl.int64)[:, None] * row_stride
    out_ptr += problem * out_batch_stride + r.to(tl.int64)[:, None] * out_row_stride
    norm = tl.full([ROWS], 1.0, acc)
    if norm_ptr is not None:
        squares = tl.zeros([ROWS, FEATURES], acc)
        for start in range(0, width, FEATURES):
            d = start + features
            exists = (r < rows)[:, None] & (d < width)[None, :]
            x = tl.load(values_ptr + d.to(tl.int64)[None, :] * feature_stride, mask=exists, other=0).to(acc)
            squares += x * x
        square = tl.sum(squares, 1)
        small = square <= tl.full([], _SMALLEST_SQUARE, acc)
        norm = tl.where(small, tl.full([], _SMALLEST_NORM, acc), square_root(square, DOUBLE))
        tl.store(norm_ptr + problem * rows + r, norm, mask=r < rows)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, out_features), FEATURES):
        d = start + features
        exists = (r < rows)[:, None] & (d < width)[None, :]
        x = tl.load(values_ptr + d.to(tl.int64)[None, :] * feature_stride, mask=exists, other=0).to(acc)
        if norm_ptr is not None:
            x = quotient(x, tl.broadcast_to(norm[:, None], [ROWS, FEATURES]), DOUBLE)
        if LOG:
            x = tl.where(exists, tl.log(x), 0.0)
        tl.store(
            out_ptr + d.to(tl.int64)[None, :] * out_feature_stride, x, mask=fits[:, None] & (d < out_features)[None, :]
        )


class Side(NamedTuple):
    """``values`` made ready: ``[B, D, rows]`` or ``[B, rows, D]``, the last dimension filled up to ``ALIGNMENT``."""

    ready: Tensor
    norm: Tensor | None  # [B, rows], of cosine


def side(values: Tensor, metric: str, wide: torch.dtype, *, neighbours: str, log: bool = False) -> Side:
    """Lay ``values`` ``[B, rows, D]`` out with ``neighbours`` ("rows" or "features") beside one another.

    Rows are filled up to whole tiles of forward.
    """
    B, rows, D = values.shape
    filled = triton.cdiv(rows, ALIGNMENT) * ALIGNMENT, triton.cdiv(D, ALIGNMENT) * ALIGNMENT
    if neighbours == "rows":
        ready = values.new_empty(B, D, filled[0], dtype=wide)
        owned, features, strides = filled[0], D, (D * filled[0], 1, filled[0])
    else:
        ready = values.new_empty(B, rows, filled[1], dtype=wide)
        owned, features, strides = rows, filled[1], (rows * filled[1], filled[1], 1)
    unit = metric == "cosine"
    norm = values.new_empty(B, rows, dtype=wide) if unit else None
    if not ready.numel():
        if norm is not None:
            norm.fill_(SMALLEST_NORM)
        return Side(ready, norm)
    span = features if unit else ALIGNMENT
    launch = launch_options("pairwise_cost.prepare", values.device)
    _prepare[(B * triton.cdiv(owned, launch["ROWS"]), triton.cdiv(features, span))](
        values,
        ready,
        norm,
        rows,
        D,
        span,
        *values.stride(),
        owned,
        features,
        *strides,
        LOG=log,
        DOUBLE=wide == torch.float64,
        FEATURES=ALIGNMENT,
        **launch,
    )
    return Side(ready, norm)
