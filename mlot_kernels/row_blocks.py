"""Row-wise operators of a student's logits and a teacher's that are made a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlot_kernels.checks import accumulator
from mlot_kernels.logits import Logits
from mlot_kernels.registry import once_differentiable
from mlot_kernels.rows import Pairing, Rows
from mlot_kernels.teachers import RowSource

RowWise = Callable[[Logits, Logits], Tensor]

PARTS = 4  # that a block is read in: the student's gradient of one part is all that exists beside a block


def by_blocks(
    operator: RowWise, student: Logits, source: RowSource, pairs: Pairing, temperature: float, vocab_size: int | None
) -> Tensor:
    """``operator(student, Logits(source's logits, pairs.teacher, temperature))``, ``[B, A]``.

    Differentiable with respect to the student's ``values``. Beyond the gradient, one block of the source's logits
    exists at a time, and ``1 / PARTS`` of one of the student's.
    """
    partner = _partners(pairs)  # [B, T]
    each = _ByBlocks.apply(student.values, operator, student, source, partner, temperature, vocab_size)
    at = pairs.student.index
    if each.shape[1] == 0:
        return each.new_zeros(at.shape)
    return each.gather(1, at.clamp(min=0)).masked_fill(at < 0, 0)


def _partners(pairs: Pairing) -> Tensor:
    """For each of the student's positions ``[B, T]`` the teacher's that it is paired with, -1 without one."""
    index, length = pairs.student.index, pairs.student.length
    nowhere = index.new_full((index.shape[0], length + 1), -1)  # what is no pair meets at the last column, which is cut
    return nowhere.scatter(1, index.masked_fill(index < 0, length), pairs.teacher.index)[:, :length]


class _ByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        values: Tensor,
        operator: RowWise,
        student: Logits,
        source: RowSource,
        partner: Tensor,
        temperature: float,
        vocab_size: int | None,
    ) -> Tensor:
        dtype = torch.promote_types(accumulator(values.dtype), accumulator(source.by_position.dtype))
        each = values.new_zeros(partner.shape, dtype=dtype)

        def visit(part: slice, rows: Rows, teacher: Logits) -> None:
            loss = operator(replace(student, values=values[:, part], rows=rows), teacher)
            each[:, part] = _at_positions(loss, rows)

        _over_parts(visit, partner, source, temperature, vocab_size)
        return each

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, operator, student, source, partner, temperature, vocab_size = inputs
        ctx.save_for_backward(values, partner)
        ctx.rest = operator, student, source, temperature, vocab_size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        values, partner = saved
        operator, student, source, temperature, vocab_size = ctx.rest
        gradient = torch.zeros_like(values)

        def visit(part: slice, rows: Rows, teacher: Logits) -> None:
            of_loss = grad[:, part].gather(1, rows.index.clamp(min=0)).masked_fill(~rows.counted, 0)
            made = torch.func.vjp(  # which torch.func and torch.compile can trace
                lambda own: operator(replace(student, values=own, rows=rows), teacher), values[:, part]
            )
            gradient[:, part] = made[1](of_loss)[0]

        _over_parts(visit, partner, source, temperature, vocab_size)
        return gradient, *(None,) * 6


def _over_parts(
    visit: Callable[[slice, Rows, Logits], None],
    partner: Tensor,
    source: RowSource,
    temperature: float,
    vocab_size: int | None,
) -> None:
    """Call ``visit`` for ranges of positions, with the rows that count there and the teacher's logits at these."""
    B, T = partner.shape
    if B == 0:
        return
    height = max(1, source.block_rows // B)
    step = -(-height // PARTS)
    may_ask = partner.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere to ask is to wait
    for start in range(0, T, height):
        block = partner[:, start : start + height]
        if may_ask and not (block >= 0).any():
            continue
        logits = source.logits(block)
        for first in range(0, block.shape[1], step):
            mask = block[:, first : first + step] >= 0
            rows = Rows.from_mask(mask, spans="one")
            part = slice(start + first, start + first + mask.shape[1])
            visit(part, rows, Logits(logits[:, first : first + step], rows, temperature, vocab_size=vocab_size))
        del logits  # before the next block is made


def _at_positions(loss: Tensor, rows: Rows) -> Tensor:
    """``loss`` ``[B, A]`` of the counted rows at their positions ``[B, T]``, 0 elsewhere."""
    to = rows.index.masked_fill(~rows.counted, rows.length)
    return loss.new_zeros(loss.shape[0], rows.length + 1).scatter(1, to, loss)[:, : rows.length]
