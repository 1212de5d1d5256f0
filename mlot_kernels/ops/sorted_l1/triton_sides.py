"""What the launches of sorted_l1 pass of a side beside its fields: what forward leaves, and room to order its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mlot_kernels.logits import Side
from mlot_kernels.ops.sorted_l1.triton_bins import ITEMS
from mlot_kernels.ops.sorted_l1.triton_order import VALUES

COUNTED_FROM = 4096
"""Rows of so many columns are counted; of fewer, a sort takes less than a look through the counters."""
COUNTED_PAIRS = 128
"""So many pairs are counted at a time, whatever the batch: two programs each fill a GPU."""
PROGRAMS = 1024  # that sort, at most: more than a GPU runs at once
ORDERED = {"num_stages": 1}
"""Loops must not be pipelined: what a program has written into its buffers it reads behind a barrier."""

_KEYS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Saved(NamedTuple):
    """What forward leaves of a side, in the schema's order: ``[B, A]``; ``steps`` ``[B, A, 64, 2]``."""

    peak: Tensor
    log_total: Tensor
    mean: Tensor
    scale: Tensor
    slope: Tensor
    total: Tensor
    moment: Tensor
    steps: Tensor


class Buffers(NamedTuple):
    """Where programs order a side's rows: ``triton_order.order``."""

    keys: Tensor  # [programs, width], integers as wide as the logits
    width: int
    counts: Tensor | None  # [programs, VALUES]; None: rows are sorted
    spare: Tensor | None  # as keys; its memory is that of the other side's, too
    spare_stride: int
    columns: Tensor | None = None  # [programs, width], where the columns are sorted along
    spare_columns: Tensor | None = None


def are_counted(sides: Sequence[Side]) -> bool:
    return all(side.values.element_size() <= 4 and side.vocab_size >= COUNTED_FROM for side in sides)


def buffers(sides: Sequence[Side], counted: bool = False, columns_of: Side | None = None) -> tuple[int, list[Buffers]]:
    """How many programs there is room for, and each side's buffers.

    All together take no more than a float for each column of a sequence and for each 64 logits, but are enough for one
    program.

    Args:
        counted: 16-bit rows are counted, not sorted.
        columns_of: a side whose columns are sorted along, so that it is not counted.
    """
    B, A = sides[0].row_index.shape
    counts = [counted and side.values.element_size() == 2 and side is not columns_of for side in sides]
    bytes_of = [side.vocab_size * side.values.element_size() for side in sides]
    sorts = [size for size, counted in zip(bytes_of, counts, strict=True) if not counted]
    spare = triton.cdiv(max(sorts, default=0), 8) * 8
    each = 6 * VALUES * sum(counts) + sum(sorts) + spare + (8 * columns_of.vocab_size if columns_of else 0)
    most = sum(4 * side.vocab_size * B + side.vocab_size * B * A // 16 for side in sides)
    programs = max(1, min(B * A, PROGRAMS, most // each))
    if not sorts:
        programs = min(B * A, COUNTED_PAIRS)
    room = sides[0].values.new_empty(programs * spare, dtype=torch.uint8)
    made = []
    for side, is_counted in zip(sides, counts, strict=True):
        size = side.values.element_size()
        width = VALUES if is_counted else side.vocab_size
        keys = side.values.new_empty(programs, width, dtype=_KEYS[size])
        if is_counted:
            made.append(Buffers(keys, width, keys.new_empty(programs, width, dtype=torch.int32), None, 0))
            continue
        columns: list[Tensor | None] = [None, None]
        if side is columns_of:
            columns = [keys.new_empty(keys.shape, dtype=torch.int32) for _ in range(2)]
        made.append(Buffers(keys, width, None, room.view(keys.dtype), spare // size, *columns))
    return programs, made


class Counters(NamedTuple):
    """Where a side's rows are counted, and what ``triton_bins`` makes of float32 ones: a row of each for each pair."""

    bins: Tensor  # [pairs, VALUES]: those that occur
    counts: Tensor  # [pairs, VALUES]
    sizes: Tensor  # [pairs, 2]: how many bins occur, and how many items a float32 row needs
    states: Tensor | None  # [pairs, VALUES]; this and what follows of float32 rows only
    items: Tensor | None  # [pairs, ITEMS]
    spare: Tensor | None  # [pairs, ITEMS]
    ranks: Tensor | None  # [pairs, ITEMS + 1]
    sums: Tensor | None  # [pairs, 4]


def counters(sides: Sequence[Side]) -> tuple[int, list[Counters]]:
    """How many pairs are counted at a time, and each side's room."""
    pairs = min(sides[0].row_index.numel(), COUNTED_PAIRS)

    def new(width: int, dtype: torch.dtype) -> Tensor:
        return sides[0].values.new_empty(pairs, width, dtype=dtype)

    made = []
    for side in sides:
        lists: list[Tensor | None] = [None] * 5
        if side.values.element_size() == 4:
            lists = [new(VALUES, torch.int8), new(ITEMS, torch.int32), new(ITEMS, torch.int32)]
            lists += [new(ITEMS + 1, torch.int32), new(4, torch.float32)]
        made.append(Counters(new(VALUES, torch.int16), new(VALUES, torch.int32), new(2, torch.int32), *lists))
    return pairs, made


def variant(sides: Sequence[Side], ties: str, top_k: int, tail: str) -> tuple[int, int, dict[str, Any]]:
    """``top_k``, the rounds that a bisection takes, and the kernels' constants."""
    longest = max(side.vocab_size for side in sides)
    constants = {"STABLE": ties == "stable", "TAIL": tail == "bucket" and top_k < longest}
    return min(top_k, longest), longest.bit_length(), constants
