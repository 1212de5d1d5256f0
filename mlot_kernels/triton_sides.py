"""What the launches of two-sided operators pass of a side."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mlot_kernels.logits import Side
from mlot_kernels.triton_rows import bits_of


class Given(NamedTuple):
    """A side's fields, ``logits.Side``."""

    x: Tensor  # [B, T, V]; tuples in Triton have a field `values` of their own
    rows: Tensor  # [B, A]
    column_mask: Tensor | None
    log_scale: Tensor | None
    batch_stride: int
    row_stride: int
    vocab_size: int
    temperature_bits: int


def given(side: Side) -> Given:
    batch_stride, row_stride = side.values.stride()[:2]
    return Given(
        x=side.values,
        rows=side.row_index.contiguous(),
        column_mask=side.column_mask,
        log_scale=None if side.log_scale is None else side.log_scale.contiguous(),
        batch_stride=batch_stride,
        row_stride=row_stride,
        vocab_size=side.vocab_size,
        temperature_bits=bits_of(side.temperature),
    )
