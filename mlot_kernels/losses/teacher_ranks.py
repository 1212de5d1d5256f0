"""A teacher's largest columns, in whatever form it comes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.logits import Logits, Ranked
from mlot_kernels.losses.entries import entries
from mlot_kernels.ops.rank_truncate import rank_truncate
from mlot_kernels.ops.topk_softmax import topk_softmax
from mlot_kernels.rows import Rows
from mlot_kernels.teachers import Teacher, TeacherHidden, TeacherTopK, log_rest, need_columns

_FIXED_POINT = 2.0**40  # sums of probabilities as integers, which come out the same in any order


def rank_teacher(
    teacher: Teacher,
    rows: Rows,
    *,
    k: int,
    scope: str,
    also_at: tuple[float, ...],
    vocab_size: int,
    backend: str | None,
) -> Ranked:
    """``rank_truncate`` of the teacher at temperature 1, whatever it comes as."""
    if isinstance(teacher, TeacherHidden):
        return _of_hidden(teacher, rows, k, scope, also_at, vocab_size, backend)
    if isinstance(teacher, TeacherTopK):
        return _of_top_k(teacher, rows, k, scope, also_at, vocab_size)
    logits = Logits(teacher, rows, vocab_size=vocab_size)
    return rank_truncate(logits, k=k, scope=scope, also_at=also_at, backend=backend)


def _of_hidden(
    teacher: TeacherHidden,
    rows: Rows,
    k: int,
    scope: str,
    also_at: tuple[float, ...],
    vocab_size: int,
    backend: str | None,
) -> Ranked:
    """Sequence by sequence: what is ranked together must be there together."""
    if scope == "batch":
        raise ValueError(
            f"scope={scope!r} ranks all sequences together, of which TeacherHidden never holds more than one; pass "
            "scope='sequence' or 'token', or the teacher's logits"
        )
    ranked = []
    for b in range(len(rows.index)):
        own = TeacherHidden(
            teacher.hidden[b : b + 1], teacher.weight, teacher.bias, teacher.logit_scale, teacher.softcap
        )
        index = rows.index[b : b + 1]
        logits = Logits(own.logits(index), Rows.from_mask(index >= 0, spans="one"), vocab_size=vocab_size)
        ranked.append(rank_truncate(logits, k=k, scope=scope, also_at=also_at, backend=backend))
        del logits  # before the next sequence's
    log_p, columns, mass = zip(*ranked, strict=True)
    return Ranked(torch.cat(log_p, 1), torch.cat(columns), torch.cat(mass))


def _of_top_k(
    teacher: TeacherTopK, rows: Rows, k: int, scope: str, also_at: tuple[float, ...], vocab_size: int
) -> Ranked:
    known = _Known(teacher, rows, vocab_size, "MultiLevelOTLoss")
    if scope == "token":
        columns = known.largest_of_each(k)
    else:
        columns = known.largest(k, scope)
    kept = known.at(columns)  # [B, A, k]
    out = [kept / temperature - known.log_total(temperature) for temperature in (1.0, *also_at)]
    out = [x.masked_fill(~rows.counted[..., None], 0) for x in out]
    mass = out[0].exp().sum(-1).masked_fill(~rows.counted, 0)
    return Ranked(torch.stack(out), columns, mass)


class Top(NamedTuple):
    """A teacher's rows at their own k largest columns and at k others."""

    columns: Tensor  # [B, A, k], its own; vocab_size or more where a top-k has fewer
    values: Tensor  # [B, A, 2 k], logits or log-probabilities, at its own and then at the others
    lse: Tensor  # [B, A], what makes log-probabilities of them; NaN where a row holds NaN


def top_of_teacher(teacher: Teacher, rows: Rows, others: Tensor, *, vocab_size: int, backend: str | None) -> Top:
    """The teacher's k largest columns, k being as many as there are ``others`` ``[B, A, k]``, whatever it comes as."""
    k = others.shape[-1]
    if isinstance(teacher, TeacherTopK):
        known = _Known(teacher, rows, vocab_size, "RankingLoss")
        columns = known.largest_of_each(k)
        values = known.at(torch.cat((columns, others), -1)) - known.log_total(1)
        return Top(columns, values, known.log_total(1).squeeze(-1) * 0)
    if isinstance(teacher, Tensor):
        return _top_of_logits(teacher, rows, others, vocab_size, backend)
    parts = []
    height = max(1, teacher.block_rows // max(1, len(others)))
    for start in range(0, others.shape[1], height):
        index = rows.index[:, start : start + height]
        logits, own = teacher.logits(index), Rows.from_mask(index >= 0, spans="one")
        parts.append(_top_of_logits(logits, own, others[:, start : start + height], vocab_size, backend))
        del logits  # before the next block's
    return Top(*(torch.cat(x, 1) for x in zip(*parts, strict=True)))


def _top_of_logits(logits: Tensor, rows: Rows, others: Tensor, vocab_size: int, backend: str | None) -> Top:
    top = topk_softmax(Logits(logits, rows, vocab_size=vocab_size), others.shape[-1], backend=backend)
    columns = top.columns.clamp(0, vocab_size - 1)  # a row with NaN has any
    return Top(columns, entries(logits, rows.index, torch.cat((columns, others), -1)), top.lse)


class _Known:
    """Rows of a top-k as if they were whole: a column that a row does not know has its share of the tail, or 0."""

    def __init__(self, teacher: TeacherTopK, rows: Rows, vocab_size: int, loss: str) -> None:
        need_columns(teacher, loss)
        if teacher.tail == "bucket":
            raise ValueError(
                f"{loss} reads the teacher's probability of single columns, of which TeacherTopK with tail='bucket' "
                "knows no more than the K; take tail='renormalize' or 'uniform'"
            )
        self.vocab_size, self.counted = vocab_size, rows.counted[..., None]
        self.log_p, slots = teacher.at(rows.index, vocab_size)  # [B, A, K]
        self.silent = (slots == vocab_size) | ~self.counted
        self.slots = slots.masked_fill(self.silent, vocab_size)
        number = (vocab_size - (~self.silent).sum(-1, keepdim=True)).to(self.log_p.dtype)  # of columns not known
        self.log_number = number.log()
        self.other = torch.full_like(self.log_p[..., :1], float("-inf"))  # log p of one of them, [B, A, 1]
        if teacher.tail == "uniform":
            self.other = (log_rest(self.log_p) - self.log_number).masked_fill(number <= 0, float("-inf"))

    def log_total(self, temperature: float) -> Tensor:
        """What ``log_p / temperature`` is normalised by, ``[B, A, 1]``; NaN in a row with NaN."""
        known = (self.log_p / temperature).logsumexp(-1, keepdim=True)
        return torch.logaddexp(known, self.other / temperature + self.log_number)

    def largest_of_each(self, k: int) -> Tensor:
        """Each row's k largest columns ``[B, A, k]``, the lower one first where they are equal."""
        checks.integer("k", k, 1, self.log_p.shape[2], "the K of TeacherTopK, where each row is ranked by itself")
        by_column = self.slots.argsort(dim=-1, stable=True)
        log_p = self.log_p.masked_fill(self.silent, float("-inf")).gather(-1, by_column)
        order = log_p.argsort(dim=-1, descending=True, stable=True)[..., :k]
        return self.slots.gather(-1, by_column.gather(-1, order))

    def largest(self, k: int, scope: str) -> Tensor:
        """The k columns with the largest sums over rows ``[B, k]``, the lower one first where they are equal."""
        B, V = len(self.slots), self.vocab_size
        # Less what all columns have in common, the rows' shares of their tails.
        total = self.log_total(1)
        gain = ((self.log_p - total).exp() - (self.other - total).exp()).masked_fill(self.silent, 0)
        fixed = (gain.double() * _FIXED_POINT).nan_to_num().round().long()
        first = torch.arange(B, device=self.slots.device)[:, None, None] * (V + 1)
        sums = fixed.new_zeros(B * (V + 1)).index_add_(0, (self.slots + first).flatten(), fixed.flatten())
        sums = sums.view(B, V + 1)[:, :V]
        if scope == "batch":
            sums = sums.sum(0, keepdim=True).expand(B, -1)
        return sums.argsort(dim=-1, descending=True, stable=True)[:, :k]

    def at(self, columns: Tensor) -> Tensor:
        """Log-probabilities, not normalised, at ``columns`` ``[B, k]`` or ``[B, A, k]``: ``[B, A, k]``."""
        B, k = len(columns), columns.shape[-1]
        if columns.dim() == 3:
            met = self.slots[..., None, :] == columns[..., None]  # [B, A, k, K]
            kept = self.log_p.gather(-1, met.to(torch.uint8).argmax(-1))
            return torch.where(met.any(-1), kept, self.other)
        place = columns.new_full((B, self.vocab_size + 1), k)
        place.scatter_(1, columns, torch.arange(k, device=columns.device).expand(B, k))
        to = place.gather(1, self.slots.flatten(1)).view_as(self.slots)
        return self.other.repeat(1, 1, k + 1).scatter(-1, to, self.log_p)[..., :k]
