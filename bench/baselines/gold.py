"""GOLD's hybrid loss: TRL's own class (trl.experimental.gold, 1.16), and the same tidied by hand."""

from __future__ import annotations

import itertools
import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.baselines.rows import wide

LEAST = 1e-8  # that a probability counts as, in the divergence and as a factor


def trl_hybrid_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    student_offsets: Tensor,
    teacher_offsets: Tensor,
    column_pairs: Tensor,
) -> Tensor:
    """``hybrid_loss`` of rows merged as ``"observed"``, where all tokens of both sides count, as TRL computes it.

    TRL computes in the dtype of the logits; its trainer hands it float32, and so does this function.

    Args:
        student_logits: ``[B, T_s, V_s]``, teacher_logits: ``[B, T_t, V_t]``.
        student_ids, teacher_ids: ``[B, T]`` int64.
        student_offsets, teacher_offsets: ``[B, T, 2]`` int64.
        column_pairs: ``[P, 2]`` int64, in the order of the teacher's columns.

    Returns:
        The mean over samples, a scalar.
    """
    loss = _uld_loss()
    own, other = column_pairs.unbind(1)
    # What TRL makes of two tokenizers, once.
    loss._teacher_matched_ids = set(other.tolist())
    loss._vocab_mapping = dict(zip(other.tolist(), own.tolist(), strict=True))
    loss.mapping_tensor = own.new_full((teacher_logits.shape[2],), -1).scatter(0, other, own)
    return loss(
        wide(student_logits),
        wide(teacher_logits),
        student_ids,  # labels, of which none is -100
        teacher_ids,
        student_input_ids=student_ids,
        teacher_input_ids=teacher_ids,
        student_byte_offsets=student_offsets,
        teacher_byte_offsets=teacher_offsets,
    )


@cache
def _uld_loss() -> Any:
    try:
        from trl.experimental.gold.gold_trainer import ULDLoss
    except ImportError as error:
        raise ImportError("this baseline needs TRL 1.16: pip install 'mlot-kernels[trl]'") from error
    # The fields that the class reads; a GOLDConfig has these and a whole trainer's beside them.
    return ULDLoss(
        SimpleNamespace(
            use_extended_uld=True,
            uld_token_merge_strategy="observed",
            uld_crossentropy_weight=0.0,
            uld_distillation_weight=1.0,
            uld_student_temperature=1.0,
            uld_teacher_temperature=1.0,
            uld_skip_student_eos=False,
            uld_skip_teacher_eos=False,
            uld_use_hybrid_loss=True,
            uld_hybrid_matched_weight=None,
            uld_hybrid_unmatched_weight=None,
            beta=0.5,
        )
    )


def dense_hybrid_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    student_offsets: Tensor,
    teacher_offsets: Tensor,
    column_pairs: Tensor,
) -> Tensor:
    """The same without a loop over tokens' rows; arguments and result as of ``trl_hybrid_loss``."""
    own, other = column_pairs.unbind(1)
    rest = [
        torch.ones(x.shape[2], dtype=torch.bool, device=x.device).index_fill(0, columns, False).nonzero().flatten()
        for x, columns in ((student_logits, own), (teacher_logits, other))
    ]
    share = len(column_pairs) / teacher_logits.shape[2]
    losses = []
    for b in range(len(student_logits)):
        groups = _groups(student_offsets[b, :, 1].tolist(), teacher_offsets[b, :, 1].tolist())
        s = _merged(wide(student_logits[b]), student_ids[b], groups[0])
        t = _merged(wide(teacher_logits[b]), teacher_ids[b], groups[1])
        matched = _jsd(s[:, own], t[:, other])
        unmatched = [p[:, columns].sort(descending=True).values for p, columns in ((s, rest[0]), (t, rest[1]))]
        width = max(x.shape[1] for x in unmatched)
        unmatched = [functional.pad(x, (0, width - x.shape[1])) for x in unmatched]
        distance = (unmatched[0] - unmatched[1]).abs().sum()
        losses.append((share * matched + (1 - share) * distance) / len(s))
    return torch.stack(losses).mean()


def _groups(student: list[int], teacher: list[int]) -> tuple[list[int], list[int]]:
    """The first token of each group on either side, from the ends of all tokens."""
    common = sorted(set(student) & set(teacher))
    sides = []
    for ends in (student, teacher):
        place = {end: i for i, end in enumerate(ends)}
        sides.append([0, *(place[end] + 1 for end in common)])
    (s, t), (n_s, n_t) = sides, (len(student), len(teacher))
    if s[-1] == n_s or t[-1] == n_t:  # nothing left on a side: no last group
        s.pop()
        t.pop()
    return s, t


def _merged(logits: Tensor, ids: Tensor, first: list[int]) -> Tensor:
    p = logits.softmax(-1)
    of_token = p.gather(1, ids[:, None]).squeeze(1).clamp_min(LEAST).log()
    lengths = [b - a for a, b in itertools.pairwise([*first, len(ids)])]
    starts = torch.tensor(first, device=ids.device)
    group = torch.repeat_interleave(
        torch.arange(len(first), device=ids.device), torch.tensor(lengths, device=ids.device)
    )
    inside = torch.ones_like(ids, dtype=torch.bool).index_fill(0, starts, False)
    scale = of_token.new_zeros(len(first)).index_add(0, group, of_token.masked_fill(~inside, 0))
    return p[starts] * scale.exp()[:, None]


def _jsd(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = (x.clamp_min(LEAST).log() for x in (student, teacher))
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    of_teacher = functional.kl_div(log_m, log_p, reduction="sum", log_target=True)
    of_student = functional.kl_div(log_m, log_q, reduction="sum", log_target=True)
    return (of_teacher + of_student) / 2
