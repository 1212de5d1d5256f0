"""rank_truncate and gather_columns on a GPU.

Forward reads the logits twice: for the rows' statistics, and for the columns' sums of probability, of which a program
holds one tile over up to 64 rows of a sequence. What the programs leave is added in order, so that a sequence's sums
depend on nothing but its own rows. Backward is that of ``triton_gradient``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels import triton_rows as rows
from mlot_kernels.triton_gradient import gradient_at_columns
from mlot_kernels.triton_rows import exponent_factor, load_tile, row_of, store_tile
from mlot_kernels.triton_select import columns_of, largest_columns, order_of
from mlot_kernels.triton_tiles import launch_options

PARTIAL_ROWS = 64  # counted rows of a sequence that are added up by one program, on every architecture


@triton.jit
def _partial_sums(
    values_ptr,
    index_ptr,
    log_scale_ptr,
    peak_ptr,
    log_total_ptr,
    scale_ptr,
    partial_ptr,
    slots,
    parts,
    batch_stride,
    row_stride,
    vocab_size,
    temperature_bits,
    ROWS: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one tile of columns over ROWS rows of one sequence: reads their logits, writes the sums of probability.

    ``partial`` ``[B, parts, vocab_size]``. A row whose statistics are NaN makes all its sequence's sums NaN.
    """
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    part = tl.program_id(0)
    sequence = part // parts
    first = part % parts * ROWS
    start = tl.program_id(1) * BLOCK
    sums = tl.zeros([BLOCK], acc)
    for a in range(first, tl.minimum(first + ROWS, slots)):
        slot = sequence * slots + a
        x_ptr, counts = row_of(values_ptr, index_ptr, slot, slots, batch_stride, row_stride)
        if counts:
            factor = exponent_factor(temperature_bits, tl.load(scale_ptr + slot), acc)
            log_weight = -tl.load(log_total_ptr + slot)
            if log_scale_ptr is not None:
                log_weight += tl.load(log_scale_ptr + slot).to(acc)
            x = load_tile(x_ptr, start, vocab_size, acc, BLOCK)
            sums += tl.exp2((x - tl.load(peak_ptr + slot)) * factor) * tl.exp(log_weight)
    store_tile(partial_ptr + part.to(tl.int64) * vocab_size, start, vocab_size, sums, BLOCK)


@triton.jit
def _order(partial_ptr, column_mask_ptr, out_ptr, parts, vocab_size, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):
    """Owns one tile of one ranking: adds its partial sums in order and writes what ranks its columns.

    That is an int64 that is different for every column, larger for a larger sum and then for a lower column; NaN is
    above all, columns that are not looked at are below all. Where DOUBLE it is the sum itself, or -1.
    """
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    ranking = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], acc)
    for part in range(0, parts):
        at = (ranking * parts + part) * vocab_size
        sums += tl.load(partial_ptr + at + columns, mask=columns < vocab_size, other=0)
    if column_mask_ptr is not None:
        looked_at = tl.load(column_mask_ptr + columns, mask=columns < vocab_size, other=0) != 0
        sums = tl.where(looked_at, sums, -1.0)
    if not DOUBLE:
        bits = tl.where(sums == sums, sums.to(tl.int32, bitcast=True), 0x7FFFFFFF)  # sums are not negative: bits sort
        tl.store(out_ptr + ranking * vocab_size + columns, order_of(bits, columns), mask=columns < vocab_size)
    else:
        tl.store(out_ptr + ranking * vocab_size + columns, sums, mask=columns < vocab_size)


def _rank(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    scalars: rows.Scalars,
    temperature: float,
    vocab_size: int,
    k: int,
    scope: str,
) -> tuple[Tensor, Tensor]:
    """The columns ``[B, k]``, and what is added to a sequence's log-probabilities ``[B]``: NaN where a sum is NaN."""
    B, A = index.shape
    parts = triton.cdiv(A, PARTIAL_ROWS)
    double = scalars.peak.dtype == torch.float64
    partial = scalars.peak.new_empty(B, parts, vocab_size)
    if B * parts:
        launch = launch_options("rank_truncate.partial_sums", values.device)
        _partial_sums[(B * parts, triton.cdiv(vocab_size, launch["BLOCK"]))](
            values,
            index.contiguous(),
            None if log_scale is None else log_scale.contiguous(),
            scalars.peak,
            scalars.log_total,
            scalars.scale,
            partial,
            A,
            parts,
            *values.stride()[:2],
            vocab_size,
            rows.bits_of(temperature),
            ROWS=PARTIAL_ROWS,
            DOUBLE=double,
            **launch,
        )
    rankings = 1 if scope == "batch" else B
    order = partial.new_empty(rankings, vocab_size, dtype=torch.float64 if double else torch.int64)
    if rankings:
        launch = launch_options("rank_truncate.order", values.device)
        _order[(rankings, triton.cdiv(vocab_size, launch["BLOCK"]))](
            partial, column_mask, order, B * parts // rankings, vocab_size, DOUBLE=double, **launch
        )
    if double:
        top, columns = order.sort(dim=-1, descending=True, stable=True)
        columns, nan = columns[:, :k], top[:, 0].isnan()
    else:
        top = order.topk(k).values
        columns, nan = columns_of(top), top[:, 0] >> 32 == 0x7FFFFFFF
    poison = partial.new_zeros(rankings).masked_fill(nan, float("nan"))
    return columns.expand(B, k).contiguous(), poison.expand(B).contiguous()


def _of_each_row(values: Tensor, index: Tensor, column_mask: Tensor | None, vocab_size: int, k: int) -> Tensor:
    """``[B, A, k]``: probabilities are ordered as logits are. Where no row counts, the first that are looked at."""
    first = torch.arange(vocab_size, device=index.device)
    if column_mask is not None:
        first = (~column_mask[:vocab_size]).to(torch.uint8).argsort(stable=True)
    chosen = largest_columns(values, index, column_mask, vocab_size, k)
    return torch.where(index[..., None] >= 0, chosen, first[:k])


def forward(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    given: Tensor | None,
    temperatures: Sequence[float],
    standardize: bool,
    vocab_size: int,
    k: int,
    scope: str,
) -> tuple[Tensor, ...]:
    scalars = rows.statistics(values, index, temperatures, standardize, vocab_size)
    poison = None
    if given is not None:
        columns = given.clone()
    elif scope == "token":
        columns = _of_each_row(values, index, column_mask, vocab_size, k)
    else:
        columns, poison = _rank(values, index, column_mask, log_scale, scalars, temperatures[0], vocab_size, k, scope)
    kept_mass = scalars.peak.new_empty(index.shape)
    log_probabilities = rows.gather(
        values,
        index,
        column_mask,
        log_scale,
        columns,
        scalars,
        temperatures,
        vocab_size,
        poison=poison,
        mass=kept_mass,
    )
    return log_probabilities, columns, kept_mass, *scalars


def backward(
    grad_log_probabilities: Tensor,
    grad_kept_mass: Tensor,
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    columns: Tensor,
    log_probabilities: Tensor,
    peak: Tensor,
    log_total: Tensor,
    expected: Tensor,
    mean: Tensor,
    scale: Tensor,
    slope: Tensor,
    temperatures: Sequence[float],
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    return gradient_at_columns(
        grad_log_probabilities,
        log_probabilities[0],
        grad_kept_mass.contiguous(),
        None,
        values,
        index,
        column_mask,
        columns,
        rows.Scalars(peak, log_total, expected, mean, scale, slope),
        temperatures,
        vocab_size,
    )
