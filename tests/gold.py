"""GOLD's losses as they are written: a walk of two pointers, and a loop over groups and their tokens."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def walk(student: list[int], teacher: list[int], trailing: str) -> tuple[list[list[int]], list[list[int]]]:
    """Two pointers over the ends of tokens: the one whose token ends earlier advances, and both where they meet."""
    groups: tuple[list[list[int]], list[list[int]]] = ([], [])
    s = t = first_s = first_t = 0
    while s < len(student) and t < len(teacher):
        met = student[s] == teacher[t]
        advance_s, advance_t = student[s] <= teacher[t], teacher[t] <= student[s]
        s, t = s + advance_s, t + advance_t
        if met:
            groups[0].append(list(range(first_s, s)))
            groups[1].append(list(range(first_t, t)))
            first_s, first_t = s, t
    if trailing == "merge" and first_s < len(student) and first_t < len(teacher):
        groups[0].append(list(range(first_s, len(student))))
        groups[1].append(list(range(first_t, len(teacher))))
    return groups


class Batch(NamedTuple):
    """Two tokenizations of the same bytes, and logits of two models that read them."""

    student: Tensor  # [B, T_s, V_s]
    teacher: Tensor  # [B, T_t, V_t]
    student_ids: Tensor  # [B, T_s]
    teacher_ids: Tensor
    student_offsets: Tensor  # [B, T_s, 2]
    teacher_offsets: Tensor
    student_labels: Tensor  # [B, T_s], -100 but in one run
    teacher_labels: Tensor
    column_pairs: Tensor  # [P, 2]


def batch(
    seed: int,
    *,
    B: int = 3,
    lengths: tuple[int, int] = (20, 24),
    vocabularies: tuple[int, int] = (97, 83),
    dtype: torch.dtype = torch.float64,
    starts: tuple[int, int] = (1, 5),
    shared: int = 60,
    fewest: int = 3,
) -> Batch:
    """Answers of random lengths, ``fewest`` tokens at least, that begin at a position among ``starts``."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sides = []
    texts = [draw.randint(max(lengths), 2 * max(lengths)) for _ in range(B)]  # bytes
    for T, V in zip(lengths, vocabularies, strict=True):
        offsets = torch.zeros(B, T, 2, dtype=torch.int64)
        labels = torch.full((B, T), -100)
        ids = torch.randint(V, (B, T), generator=generator)
        for b, text in enumerate(texts):
            start = draw.randint(*starts)
            number = draw.randint(fewest, T - start)
            ends = [*sorted(draw.sample(range(1, text), number - 1)), text]
            answer = slice(start, start + number)
            offsets[b, answer, 1] = torch.tensor(ends)
            offsets[b, answer, 0] = torch.tensor([0, *ends[:-1]])
            labels[b, answer] = ids[b, answer]
        sides.append(
            (2 * torch.randn(B, T, V, generator=generator, dtype=torch.float64).to(dtype), ids, offsets, labels)
        )
    columns = [torch.randperm(V, generator=generator)[:shared] for V in vocabularies]
    pairs = torch.stack((columns[0], columns[1].sort().values), 1)
    return Batch(*(x for each in zip(*sides, strict=True) for x in each), pairs)


def merged(p: Tensor, groups: list[list[int]], tokens: list[int], strategy: str) -> Tensor:
    """Rows ``[G, V]`` of a side's probabilities ``[n, V]``."""
    rows = []
    for group in groups:
        base, others = (group[-1], group[:-1]) if strategy == "bayesian" else (group[0], group[1:])
        row = p[base]
        if strategy != "first":
            for token in others:
                row = row * p[token, tokens[token]].clamp_min(1e-8)
        rows.append(row)
    return torch.stack(rows)


def sorted_distance(p: Tensor, q: Tensor) -> Tensor:
    width = max(p.shape[1], q.shape[1])
    p, q = (functional.pad(x.sort(descending=True).values, (0, width - x.shape[1])) for x in (p, q))
    return (p - q).abs().sum(1)


def divergence(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """The teacher's p, the student's q."""
    log_p, log_q = p.clamp_min(1e-8).log(), q.clamp_min(1e-8).log()
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(1)
    if beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum(1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(1)


def rows_of_groups(
    batch: Batch, b: int, strategy: str, temperatures: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, Tensor] | None:
    """The merged probabilities of sequence ``b`` on both sides, ``[G, V]``; None where there is no group."""
    shift = 0 if strategy == "observed" else 1
    answers = [(labels[b] != -100).nonzero().flatten() for labels in (batch.student_labels, batch.teacher_labels)]
    ends = [
        offsets[b, answer, 1].tolist()
        for offsets, answer in zip((batch.student_offsets, batch.teacher_offsets), answers, strict=True)
    ]
    groups = walk(ends[0], ends[1], "merge")
    if shift and min(int(answer[0]) for answer in answers) == 0:
        groups = groups[0][1:], groups[1][1:]
    if not groups[0]:
        return None
    sides = []
    for logits, ids, answer, own, temperature in zip(
        batch[:2], (batch.student_ids, batch.teacher_ids), answers, groups, temperatures, strict=True
    ):
        p = (logits[b, answer - shift] / temperature).softmax(1)
        sides.append(merged(p, own, ids[b, answer].tolist(), strategy))
    return sides[0], sides[1]


def uld(batch: Batch, strategy: str, **options: Any) -> Tensor:
    """Per sequence, ``[B]``."""
    pairs = [rows_of_groups(batch, b, strategy, **options) for b in range(len(batch.student))]
    return torch.stack([batch.student.sum() * 0 if pair is None else sorted_distance(*pair).mean() for pair in pairs])


def hybrid(
    batch: Batch, strategy: str, beta: float, weights: tuple[float, float] | None = None, **options: Any
) -> Tensor:
    """Per sequence, ``[B]``."""
    V_s, V_t = batch.student.shape[2], batch.teacher.shape[2]
    own, other = batch.column_pairs.unbind(1)
    rest_s, rest_t = (
        torch.tensor(sorted({*range(V)} - {*columns.tolist()}), dtype=torch.int64)
        for V, columns in ((V_s, own), (V_t, other))
    )
    share = len(own) / V_t
    matched, unmatched = weights or (share, 1 - share)
    losses = []
    for b in range(len(batch.student)):
        pair = rows_of_groups(batch, b, strategy, **options)
        if pair is None:
            losses.append(batch.student.sum() * 0)
            continue
        s, t = pair
        loss = matched * divergence(t[:, other], s[:, own], beta).mean()
        if len(rest_s) and len(rest_t):
            loss = loss + unmatched * sorted_distance(s[:, rest_s], t[:, rest_t]).mean()
        losses.append(loss)
    return torch.stack(losses)
