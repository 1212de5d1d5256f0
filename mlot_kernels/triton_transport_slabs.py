"""How transport problems of any size are cut into slabs of rows, for the Triton kernels of their steps and adjoint."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.triton_tiles import launch_options
from mlot_kernels.triton_transport import cost_tile, side

WIDEST = 1024  # columns of a tile; up to so many, a sweep makes D once
FEWEST_ROWS, MOST_ROWS = 32, 128  # of a slab
ONE_SLAB = 16384  # elements up to which a problem is one slab; float64: half of it


class Sizes:
    """How a problem of this shape is cut; its own shape decides, never the batch's.

    A slab has as many rows as there are slabs, up to a power of two. It is cut into tiles: of whole rows where these
    are short (``WHOLE``), else of all its rows. A problem of up to ``ONE_SLAB`` elements with short rows is one slab,
    and all its steps are one launch.
    """

    def __init__(self, cost: Tensor) -> None:
        self.B, self.M, self.N = cost.shape
        self.S = min(max(triton.next_power_of_2(max(round(self.M**0.5), 1)), FEWEST_ROWS), MOST_ROWS)
        sides = (triton.next_power_of_2(max(n, 1)) for n in (self.M, self.N))
        elements = math.prod(sides) * (2 if cost.dtype == torch.float64 else 1)
        self.one_slab = elements <= ONE_SLAB and self.N <= WIDEST
        if self.one_slab:
            self.S = max(triton.next_power_of_2(max(self.M, 1)), self.S)
        self.slabs = max(triton.cdiv(self.M, self.S), 1)
        self.rows: tuple[int, ...] = (self.B * self.slabs,)
        self.matrix: tuple[int, ...] = (*cost.stride(), self.M, self.N)
        self.double = cost.dtype == torch.float64
        self.device = cost.device

    def tiles(self, kernel: str) -> dict[str, Any]:
        """What a kernel of slabs is launched with: a tile has ``TILE`` elements, half as many in float64.

        Tiles of whole rows have at most ``ROWS`` of them, where the kernel names some: narrow problems' would spill.
        """
        launch = dict(launch_options(kernel, self.device))
        most_rows = launch.pop("ROWS", self.S)
        elements = launch.pop("TILE") // (2 if self.double else 1)
        C = max(triton.next_power_of_2(max(self.N, 1)), 16)
        whole = min(WIDEST, elements) >= C
        R = min(elements // C, self.S, most_rows) if whole else self.S
        return {"S": self.S, "R": R, "C": C if whole else elements // R, "WHOLE": whole, **launch}

    def columns(self, kernel: str) -> tuple[tuple[int, int], dict[str, Any]]:
        """Grid and options of a kernel whose programs own ``C`` columns."""
        launch = dict(launch_options(kernel, self.device))
        return (self.B, max(triton.cdiv(self.N, launch["C"]), 1)), launch


@triton.jit
def slab_of(M, S: tl.constexpr):
    """The problem and the slab that a program owns, how many slabs the problem has, and the slab's place."""
    slabs = tl.maximum((M + S - 1) // S, 1)
    problem = (tl.program_id(0) // slabs).to(tl.int64)
    slab = tl.program_id(0) % slabs
    return problem, slab, slabs, problem * slabs + slab


@triton.jit
def lowest_of(extent_ptr, problem, slabs, BLOCK: tl.constexpr):
    """The problem's lowest cost; 0 where nothing counts."""
    lowest = tl.load(extent_ptr + problem * slabs)
    for start in range(0, slabs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        extent = tl.load(extent_ptr + problem * slabs + at, mask=at < slabs, other=lowest)
        lowest = tl.minimum(lowest, tl.min(extent, 0))
    return lowest


@triton.jit
def added_up(part_ptr, problem, slabs, j, N, R: tl.constexpr, like):
    """The sum ``[C]`` of what the slabs left at columns ``j``, R slabs at a time."""
    total = tl.zeros_like(like)
    for start in range(0, slabs, R):
        s = start + tl.arange(0, R)
        at = (problem * slabs + s)[:, None] * N + j[None, :]
        total += tl.sum(tl.load(part_ptr + at, mask=(s < slabs)[:, None] & (j < N)[None, :], other=0), 0)
    return total


@triton.jit
def owns(start, slab, slabs, C: tl.constexpr):
    """Whether this slab's program writes what all slabs' programs make of the columns from ``start`` on."""
    return (start // C) % slabs == slab


@triton.jit(do_not_specialize=["N"])  # where N is the constant 1, compiling for AMD crashes
def _extent(
    cost_ptr, a_ptr, b_ptr, extent_ptr, batch_stride, row_stride, column_stride, M, N,
    S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Owns one slab: reads its costs, writes the lowest; 0 where nothing counts in the problem."""
    problem, slab, _, place = slab_of(M, S)
    cost_ptr += problem * batch_stride
    lowest = tl.full([C], float("inf"), a_ptr.dtype.element_ty)
    counts = tl.zeros([C], a_ptr.dtype.element_ty)
    for tile in range(0, S, R):
        i = slab * S + tile + tl.arange(0, R)
        a = side(a_ptr, problem, i, M)
        for start in range(0, N, C):
            j = start + tl.arange(0, C)
            b = side(b_ptr, problem, j, N)
            lowest = tl.minimum(lowest, tl.min(cost_tile(cost_ptr, i, j, a, b, row_stride, column_stride), 0))
            counts = tl.maximum(counts, b)
    tl.store(extent_ptr + place, tl.where(tl.max(counts, 0) == 0, 0.0, tl.min(lowest, 0)))


def lowest_costs(cost: Tensor, a: Tensor, b: Tensor, sizes: Sizes) -> Tensor:
    extent = a.new_empty(sizes.B, sizes.slabs)
    _extent[sizes.rows](cost, a, b, extent, *sizes.matrix, **sizes.tiles("transport_slabs.extent"))
    return extent
