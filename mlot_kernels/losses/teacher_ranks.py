"""What ``rank_truncate`` gives of a teacher's logits, of teachers that come as something else."""

from __future__ import annotations

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.logits import Logits, Ranked
from mlot_kernels.ops.rank_truncate import rank_truncate
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
    """As if the rows were whole: a column that a row does not know has the row's share of the tail, or 0."""
    need_columns(teacher, "MultiLevelOTLoss")
    if teacher.tail == "bucket" or teacher.columns is None:
        raise ValueError(
            "MultiLevelOTLoss reads the teacher's probability of single columns, of which TeacherTopK with "
            "tail='bucket' knows no more than the K; take tail='renormalize' or 'uniform'"
        )
    K = teacher.log_probabilities.shape[2]
    if scope == "token":
        checks.integer("k, with scope='token',", k, 1, K, "the K of TeacherTopK")
    log_p, slots = teacher.at(rows.index, vocab_size)  # [B, A, K]
    silent = (slots == vocab_size) | ~rows.counted[..., None]
    slots = slots.masked_fill(silent, vocab_size)
    others = vocab_size - K + silent.sum(-1, keepdim=True)
    other = torch.full_like(log_p[..., :1], float("-inf"))  # log p of a column that is not known, [B, A, 1]
    if teacher.tail == "uniform":
        other = (log_rest(log_p) - others.to(log_p.dtype).log()).masked_fill(others <= 0, float("-inf"))

    def log_total(temperature: float) -> Tensor:  # [B, A, 1]
        known = (log_p / temperature).logsumexp(-1, keepdim=True)
        return torch.logaddexp(known, other / temperature + others.clamp(min=0).to(log_p.dtype).log())

    # Each column's sum over the rows, less what all columns have in common, the rows' shares of their tails.
    gain = ((log_p - log_total(1)).exp() - (other - log_total(1)).exp()).masked_fill(silent, 0)
    if scope == "token":
        order = gain.masked_fill(silent, float("-inf")).argsort(dim=-1, descending=True, stable=True)[..., :k]
        columns = slots.gather(-1, order)
    else:
        columns = _largest(slots, gain, vocab_size, k, scope)

    kept = _at_columns(log_p, other, slots, columns, vocab_size)  # [B, A, k]
    out = [kept / temperature - log_total(temperature) for temperature in (1.0, *also_at)]
    out = [x.masked_fill(~rows.counted[..., None], 0) for x in out]
    mass = out[0].exp().sum(-1).masked_fill(~rows.counted, 0)
    return Ranked(torch.stack(out), columns, mass)


def _largest(slots: Tensor, gain: Tensor, vocab_size: int, k: int, scope: str) -> Tensor:
    """The k columns with the largest sums ``[B, k]``, the lower one first where they are equal."""
    B = slots.shape[0]
    first = torch.arange(B, device=slots.device)[:, None, None] * (vocab_size + 1)
    fixed = (gain.double() * _FIXED_POINT).nan_to_num().round().long()
    sums = fixed.new_zeros(B * (vocab_size + 1)).index_add_(0, (slots + first).flatten(), fixed.flatten())
    sums = sums.view(B, vocab_size + 1)[:, :vocab_size]
    if scope == "batch":
        sums = sums.sum(0, keepdim=True).expand(B, -1)
    return sums.argsort(dim=-1, descending=True, stable=True)[:, :k]


def _at_columns(log_p: Tensor, other: Tensor, slots: Tensor, columns: Tensor, vocab_size: int) -> Tensor:
    """``log_p`` of ``slots``, ``[B, A, K]`` both, at ``columns`` ``[B, k]`` or ``[B, A, k]``; else ``other``."""
    B, k = len(columns), columns.shape[-1]
    if columns.dim() == 3:
        met = slots[..., None, :] == columns[..., None]  # [B, A, k, K]
        found = met.any(-1)
        return torch.where(found, log_p.gather(-1, met.to(torch.uint8).argmax(-1)), other)
    place = columns.new_full((B, vocab_size + 1), k)
    place.scatter_(1, columns, torch.arange(k, device=columns.device).expand(B, k))
    place[:, vocab_size] = k
    to = place.gather(1, slots.flatten(1)).view_as(slots)
    return other.repeat(1, 1, k + 1).scatter(-1, to, log_p)[..., :k]
