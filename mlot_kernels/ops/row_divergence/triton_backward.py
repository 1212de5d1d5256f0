"""The gradient of row_divergence: one program makes a tile's terms anew and writes the gradient of both sides.

Where pairs of columns meet it writes that of one side, whose columns each look for the pairs that name them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlot_kernels.checks import accumulator
from mlot_kernels.logits import Side
from mlot_kernels.ops.row_divergence.reference import Options
from mlot_kernels.ops.row_divergence.triton_pair import (
    Saved,
    are_whole,
    below_peak,
    below_peak_at,
    columns_at,
    constants_of,
    kappa_of,
    load_pair,
    log_softmaxes,
    looked_at,
    numbers_of,
    row_at,
)
from mlot_kernels.ops.row_divergence.triton_terms import EXACT, terms
from mlot_kernels.triton_gradient import slots_of_positions
from mlot_kernels.triton_rows import double_of, store_tile
from mlot_kernels.triton_sides import given
from mlot_kernels.triton_tiles import launch_options


class Out(NamedTuple):
    """Where a side's gradient goes; None: nowhere."""

    gradient: Tensor | None  # [B, positions, width]
    positions: int
    width: int


class Named(NamedTuple):
    """A side's columns with the pairs that name each."""

    order: Tensor  # [P] int32: the pairs by this side's column, of one column in their order
    starts: Tensor  # [vocab_size + 1] int32: where each column's begin in it


@triton.jit
def _write_tile(out, side, saved, row, grad, H, softmax, below, slot, slots, start, BLOCK: tl.constexpr):
    """Writes dl/dx of a tile of one row, from H, the softmax and x - peak; 0 at -inf and behind the vocabulary."""
    total = tl.load(saved.total + slot)
    slope = tl.load(saved.slope + slot)
    temperature = double_of(side.temperature_bits).to(slope.dtype)
    through = tl.where(slope == 0, 0.0, slope * grad * tl.load(saved.moment + slot) / temperature)
    dx = (H - softmax * total) * (grad * row.inverse)
    if through != 0:
        dx -= (below - tl.load(saved.mean + slot)) * through
    columns = start + tl.arange(0, BLOCK)
    dx = tl.where((below == float("-inf")) | (columns >= side.vocab_size), 0.0, dx)
    position = tl.load(side.rows + slot)
    row_ptr = out.gradient + ((slot // slots).to(tl.int64) * out.positions + position) * out.width
    store_tile(row_ptr, start, out.width, dx, BLOCK)


@triton.jit
def _backward(
    grad_ptr,
    s,
    s_saved,
    s_out,
    t,
    t_saved,
    t_out,
    share_ptr,
    target_ptr,
    slots,
    numbers,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    FLOORS: tl.constexpr,
    MIXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one tile of one slot's rows: reads both once, writes the gradient of each side that needs it once.

    Nothing where no pair counts: that is ``_clear``'s.
    """
    slot = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    s_row, s_counts = row_at(s, s_saved, slot, slots)
    t_row, t_counts = row_at(t, t_saved, slot, slots)
    if s_counts & t_counts:
        grad = tl.load(grad_ptr + slot)
        constants = constants_of(s_row, t_row, numbers, tl.load(share_ptr + slot), KIND)
        target_log_total = tl.load(target_ptr + slot)
        s_below, t_below, s_columns, t_columns, here = load_pair(s_row, t_row, None, start, s.vocab_size, BLOCK)
        log_q, log_p = log_softmaxes(s_row, s_below, t_row, t_below, target_log_total, numbers, MIXES)
        met_q, met_p = looked_at(s_row, s_columns, t_row, t_columns, here, log_q, log_p)
        _term, of_q, of_p = terms(met_q, met_p, constants, KIND, WHOLE, FLOORS)
        if s_out.gradient is not None:
            _write_tile(s_out, s, s_saved, s_row, grad, of_q, tl.exp(log_q), s_below, slot, slots, start, BLOCK)
        if t_out.gradient is not None:
            part = grad * double_of(numbers.interpolation).to(grad.dtype)  # of the mixed logits
            _write_tile(t_out, t, t_saved, t_row, part, of_p, tl.exp(log_p), t_below, slot, slots, start, BLOCK)


@triton.jit
def _backward_at_pairs(
    grad_ptr,
    s,
    s_saved,
    t,
    t_saved,
    out,
    pairs_ptr,
    named,
    share_ptr,
    target_ptr,
    slots,
    numbers,
    KIND: tl.constexpr,
    FLOORS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Owns one tile of one slot's row of side SIDE, 0 the student's: reads it once, and of the other row what its pairs
    name; writes its gradient once.

    A column adds up its pairs in their order, one in each turn: a tile takes as many turns as its column with most.
    Nothing where no pair of rows counts: that is ``_clear``'s.
    """
    slot = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    s_row, s_counts = row_at(s, s_saved, slot, slots)
    t_row, t_counts = row_at(t, t_saved, slot, slots)
    if s_counts & t_counts:
        grad = tl.load(grad_ptr + slot)
        constants = constants_of(s_row, t_row, numbers, tl.load(share_ptr + slot), KIND)
        target_log_total = tl.load(target_ptr + slot)
        side, saved, row = (s, s_saved, s_row) if SIDE == 0 else (t, t_saved, t_row)
        other_row = t_row if SIDE == 0 else s_row
        columns = start + tl.arange(0, BLOCK)
        exists = columns < side.vocab_size
        below = below_peak(row, columns, start + BLOCK <= side.vocab_size, side.vocab_size)
        at = tl.load(named.starts + columns, mask=exists, other=0)
        end = tl.load(named.starts + columns + 1, mask=exists, other=0)
        H = tl.zeros([BLOCK], grad.dtype)
        for _ in range(0, tl.max(end - at, 0)):
            here = at < end
            pair = tl.load(named.order + at, mask=here, other=0)
            other_columns = columns_at(pairs_ptr, pair, 1 - SIDE, other_row, here)
            own = tl.where(here, below, float("-inf"))
            other = below_peak_at(other_row, other_columns, here)
            if SIDE == 0:
                log_q, log_p = log_softmaxes(s_row, own, t_row, other, target_log_total, numbers, False)
                log_q, log_p = looked_at(s_row, columns, t_row, other_columns, here, log_q, log_p)
            else:
                log_q, log_p = log_softmaxes(s_row, other, t_row, own, target_log_total, numbers, False)
                log_q, log_p = looked_at(s_row, other_columns, t_row, columns, here, log_q, log_p)
            _term, of_q, of_p = terms(log_q, log_p, constants, KIND, False, FLOORS)
            H += of_q if SIDE == 0 else of_p
            at += 1
        softmax = tl.exp(below * row.inverse - row.log_total).to(grad.dtype)
        _write_tile(out, side, saved, row, grad, H, softmax, below, slot, slots, start, BLOCK)


@triton.jit
def _clear(slot_of_ptr, other_index_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Owns one row of ``[B, T, width]``: writes zeros where no pair counts there, else nothing."""
    place = tl.program_id(0)
    slot = tl.load(slot_of_ptr + place)
    pairs = slot >= 0
    if pairs:
        pairs = tl.load(other_index_ptr + slot) >= 0
    out_ptr += place.to(tl.int64) * width
    end = tl.where(pairs, 0, width)
    for start in range(0, end, BLOCK):
        store_tile(out_ptr, start, end, tl.zeros([BLOCK], tl.float32), BLOCK)


def _named(columns: Tensor, vocab_size: int) -> Named:
    in_order, order = columns.sort(stable=True)
    numbers = torch.arange(vocab_size + 1, device=columns.device)
    return Named(order.to(torch.int32), torch.searchsorted(in_order, numbers, out_int32=True))


def backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Arguments and outputs as in the schema; a side that is not needed is empty."""
    sides, options = (Side(*arguments[:7]), Side(*arguments[7:14])), Options(*arguments[14:21])
    saved, (share, target_log_total) = (Saved(*arguments[21:28]), Saved(*arguments[28:35])), arguments[35:37]
    needed = arguments[37:]
    gradients: list[Tensor] = []
    outs: list[Out] = []
    for i, side in enumerate(sides):
        B, T, width = side.values.shape
        values = side.values.new_empty((B, T, width) if needed[i] else 0)
        outs.append(Out(values if values.numel() else None, T, width))
        gradients += [values, _by_log_scale(grad, sides, saved, options, share, i) if needed[i] else _empty(side)]
        if values.numel():
            _clear[(B * T,)](
                slots_of_positions(side.values, side.row_index),
                sides[1 - i].row_index.contiguous(),
                values,
                width,
                **launch_options("row_divergence.clear", grad.device),
            )
    if not grad.numel() or all(out.gradient is None for out in outs):
        return tuple(gradients)
    s, t = (given(side) for side in sides)
    rest = (share, target_log_total, sides[0].row_index.shape[1], numbers_of(options))
    if options.column_pairs is None:
        launch = {**launch_options("row_divergence.backward", grad.device), **EXACT}
        tiles = max(triton.cdiv(out.width, launch["BLOCK"]) for out in outs if out.gradient is not None)
        variant = {"WHOLE": are_whole(sides, options), "FLOORS": options.floor > 0, "MIXES": options.interpolation < 1}
        _backward[(grad.numel(), tiles)](
            grad, s, saved[0], outs[0], t, saved[1], outs[1], *rest, KIND=options.kind, **variant, **launch
        )
        return tuple(gradients)
    pairs = options.column_pairs.contiguous()
    launch = {**launch_options("row_divergence.backward_at_pairs", grad.device), **EXACT}
    for i, out in enumerate(outs):
        if out.gradient is not None:
            named = _named(pairs[:, i].contiguous(), sides[i].vocab_size)
            _backward_at_pairs[(grad.numel(), triton.cdiv(out.width, launch["BLOCK"]))](
                grad,
                s,
                saved[0],
                t,
                saved[1],
                out,
                pairs,
                named,
                *rest,
                KIND=options.kind,
                FLOORS=options.floor > 0,
                SIDE=i,
                **launch,
            )
    return tuple(gradients)


def _by_log_scale(
    grad: Tensor, sides: tuple[Side, Side], saved: tuple[Saved, Saved], options: Options, share: Tensor, i: int
) -> Tensor:
    """dl/dlog_scale of a side ``[B, A]``: the sum of H, with what kappa adds to it where every column meets."""
    total, log_scale = saved[i].total, sides[i].log_scale
    of_all = total
    if are_whole(sides, options):
        kappa = 2 * share - 1 if options.kind == "adaptive_kl" else kappa_of(options)
        mass = 1.0 if log_scale is None else log_scale.to(total.dtype).exp()
        of_all = total + (kappa if i == 1 else -kappa) * mass
    unpaired = (sides[0].row_index < 0) | (sides[1].row_index < 0)
    return (grad * of_all).masked_fill(unpaired, 0).to(total.dtype)


def _empty(side: Side) -> Tensor:
    return side.values.new_empty(0, dtype=accumulator(side.values.dtype))
