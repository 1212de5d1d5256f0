"""soft_rank on a GPU: a program owns some short rows, and its tiles are the pairs of each row's entries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.checks import accumulator
from mlot_kernels.triton_rows import bits_of, double_of
from mlot_kernels.triton_tiles import launch_options

_FEWEST = 16  # of a tile's side; op.py refuses more than 64, whose pairs eight warps hold in registers


@triton.jit
def _quotient(x, y, DOUBLE: tl.constexpr):
    """Rounded once, so that means which are equal come out equal."""
    y = tl.broadcast_to(y, x.shape)
    return x / y if DOUBLE else tl.div_rn(x, y)


@triton.jit
def _apart(x, y):
    """x - y, where an infinity is no distance from itself."""
    return tl.where(x == y, 0.0, x - y)


@triton.jit
def _forward(
    values_ptr,
    lengths_ptr,
    ranks_ptr,
    order_ptr,
    block_ptr,
    rows,
    row_stride,
    width,
    epsilon_bits,
    DOUBLE: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Owns ROWS rows of at most N entries: reads them twice, writes their ranks, ``order`` and ``block``.

    Nothing is sorted and nothing is pooled step by step: an entry counts what is in front of it, and a position asks
    for itself whether a block begins there (README.md). Sums run from the position outwards and over differences from
    its own value. What a row gives depends on it and on N alone.
    """
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    epsilon = double_of(epsilon_bits)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    exists = row < rows
    length = tl.where(exists, width, 0)
    if lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + row, mask=exists, other=0), 0), width).to(tl.int32)
    down = tl.arange(0, N)[None, :, None]
    across = tl.arange(0, N)[None, None, :]
    x_ptr = values_ptr + row * row_stride
    x_down = tl.load(x_ptr + down, mask=down < length, other=float("-inf")).to(acc)  # [ROWS, N, 1]
    x_across = tl.load(x_ptr + across, mask=across < length, other=float("-inf")).to(acc)  # [ROWS, 1, N]
    has_nan = tl.max((x_down != x_down).to(tl.int32), 1, keep_dims=True)
    x_down = tl.where(x_down != x_down, 0.0, x_down)
    x_across = tl.where(x_across != x_across, 0.0, x_across)

    in_front = (x_down > x_across) | ((x_down == x_across) & (down < across))
    position = tl.sum(in_front.to(tl.int32), 1, keep_dims=True)  # of the entry across; beyond the length its own column
    is_here = position == down
    s = tl.sum(tl.where(is_here, x_across, 0.0), 2, keep_dims=True)
    column = tl.sum(tl.where(is_here, across, 0), 2, keep_dims=True)
    s_across = tl.permute(s, (0, 2, 1))

    half = (epsilon * 0.5).to(acc)
    apart = _apart(s, s_across)
    m = tl.maximum(down - across, 1).to(acc)
    sums = tl.cumsum(tl.where(across < down, -apart, 0.0), 2, reverse=True)
    left = tl.min(tl.where(across < down, _quotient(sums, m, DOUBLE) - m * half, float("inf")), 2, keep_dims=True)
    p = tl.maximum(across - down + 1, 1).to(acc)
    behind = (across >= down) & (across < length)
    sums = tl.cumsum(tl.where(behind, apart, 0.0), 2)
    right = tl.min(tl.where(behind, _quotient(sums, p, DOUBLE) - p * half, float("inf")), 2, keep_dims=True)
    begins = tl.permute((left >= -right).to(tl.int32), (0, 2, 1))
    start = tl.max(tl.where((begins != 0) & (across <= down), across, 0), 2, keep_dims=True)

    in_block = start == tl.permute(start, (0, 2, 1))
    size = tl.sum(in_block.to(tl.int32), 2, keep_dims=True)
    above = tl.sum(tl.where(in_block, apart, 0.0), 2, keep_dims=True)
    of_block = (length - start).to(acc) - (size - 1).to(acc) * 0.5
    above = _quotient(above, size.to(acc), DOUBLE)
    ranks = _quotient(above, tl.full([1, 1, 1], 1, acc) * epsilon.to(acc), DOUBLE) + of_block
    counts = down < length
    ranks = tl.where(counts, tl.where(has_nan != 0, float("nan"), ranks), 0.0)
    finite = (s > float("-inf")) & (s < float("inf"))
    block = tl.where(has_nan != 0, width, tl.where(finite, start, -1 - start))
    block = tl.where(counts, block, -1 - down)
    written = exists & (down < width)
    tl.store(ranks_ptr + row * width + column, ranks, mask=written)
    tl.store(order_ptr + row * width + down, column, mask=written)
    tl.store(block_ptr + row * width + down, block, mask=written)


@triton.jit
def _backward(
    grad_ptr,
    order_ptr,
    block_ptr,
    out_ptr,
    rows,
    width,
    epsilon_bits,
    DOUBLE: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Owns the gradient of ROWS rows of at most N entries: reads upstream's and the indices twice, writes it once."""
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    down = tl.arange(0, N)[None, :, None]
    across = tl.arange(0, N)[None, None, :]
    first = row * width
    here = (row < rows) & (down < width)
    others = (row < rows) & (across < width)
    column = tl.load(order_ptr + first + down, mask=here, other=0)
    block = tl.load(block_ptr + first + down, mask=here, other=-1)
    grad = tl.load(grad_ptr + first + column, mask=here, other=0.0)
    other_column = tl.load(order_ptr + first + across, mask=others, other=0)
    other_block = tl.load(block_ptr + first + across, mask=others, other=-1)
    other_grad = tl.load(grad_ptr + first + other_column, mask=others, other=0.0)
    in_block = block == other_block
    size = tl.sum(in_block.to(tl.int32), 2, keep_dims=True)
    mean = _quotient(tl.sum(tl.where(in_block, other_grad, 0.0), 2, keep_dims=True), size.to(acc), DOUBLE)
    epsilon = tl.full([1, 1, 1], 1, acc) * double_of(epsilon_bits).to(acc)
    g = _quotient(grad - mean, epsilon, DOUBLE)
    g = tl.where(block < 0, 0.0, tl.where(block == width, float("nan"), g))
    tl.store(out_ptr + first + column, g.to(out_ptr.dtype.element_ty), mask=here)


def _tile(kernel: str, device: torch.device, width: int) -> dict[str, int]:
    """The launch's options: so many rows to a program that their pairs are PAIRS."""
    launch = dict(launch_options(kernel, device))
    N = max(_FEWEST, triton.next_power_of_2(width))
    return {"N": N, "ROWS": max(1, launch.pop("PAIRS") // (N * N)), **launch}


def forward(values: Tensor, lengths: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = values.shape
    wide = accumulator(values.dtype)
    ranks = values.new_empty(values.shape, dtype=wide)
    order, block = (values.new_empty(values.shape, dtype=torch.int32) for _ in range(2))
    if ranks.numel():
        launch = _tile("soft_rank.forward", values.device, width)
        _forward[(triton.cdiv(rows, launch["ROWS"]),)](
            values,
            lengths,
            ranks,
            order,
            block,
            rows,
            values.stride(0),
            width,
            bits_of(epsilon),
            DOUBLE=wide == torch.float64,
            **launch,
        )
    return ranks, order, block


def backward(grad: Tensor, values: Tensor, order: Tensor, block: Tensor, epsilon: float) -> Tensor:
    rows, width = values.shape
    gradient = values.new_empty(values.shape)
    if gradient.numel():
        launch = _tile("soft_rank.backward", values.device, width)
        _backward[(triton.cdiv(rows, launch["ROWS"]),)](
            grad,
            order,
            block,
            gradient,
            rows,
            width,
            bits_of(epsilon),
            DOUBLE=grad.dtype == torch.float64,
            **launch,
        )
    return gradient
