"""What a user writes today, in eager PyTorch, for the operators that read rows of logits.

Every row counts. 16-bit logits are taken to float32 first, as a user must who wants a usable result. Each function
returns the tuple of outputs of the operator of its name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def wide(x: Tensor) -> Tensor:
    """16-bit values in float32; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def row_entropy(logits: Tensor) -> tuple[Tensor]:
    """``[B, T, V]`` -> entropy in nats, ``[B, T]``; a logit of ``-inf`` gives NaN."""
    log_p = wide(logits).log_softmax(-1)
    return (-(log_p.exp() * log_p).sum(-1),)


def row_entropy_by_categorical(logits: Tensor) -> tuple[Tensor]:
    """The same by ``torch.distributions``, without its checks, which read every value once more."""
    return (torch.distributions.Categorical(logits=wide(logits), validate_args=False).entropy(),)


def token_log_probability(logits: Tensor, tokens: Tensor) -> tuple[Tensor]:
    """``[B, T, V]`` and ``[B, T]`` int64 -> log-probability of each token, ``[B, T]``."""
    return (wide(logits).log_softmax(-1).gather(2, tokens[..., None])[..., 0],)


def token_log_probability_by_cross_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor]:
    """The same by ``torch.nn.functional.cross_entropy``."""
    loss = F.cross_entropy(wide(logits).flatten(0, 1), tokens.flatten(), reduction="none")
    return (-loss.view_as(tokens),)


def jsd(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
    """``[B, T, V]`` twice -> their Jensen-Shannon divergence, ``[B, T]``, by ``torch.nn.functional.kl_div``."""
    log_q, log_p = wide(student).log_softmax(-1), wide(teacher).log_softmax(-1)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    of_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    of_student = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    return ((of_teacher + of_student) / 2,)


def topk_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``[B, T, V]`` -> the k largest log-probabilities, descending, ``[B, T, k]``, and the log-sum-exp, ``[B, T]``."""
    z = wide(logits)
    kept, columns = z.log_softmax(-1).topk(k)
    lse = z.gather(2, columns[..., :1])[..., 0] - kept[..., 0]  # cheaper than another pass over the row
    return kept, lse


def topk_softmax_by_logsumexp(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same from the raw logits' top k: no normalised copy of all logits."""
    z = wide(logits)
    lse = z.logsumexp(-1)
    return z.topk(k).values - lse[..., None], lse


def rank_truncate(logits: Tensor, k: int, temperatures: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The k columns with the largest sums over a sequence, and the log-probabilities there.

    Args:
        logits: ``[B, T, V]``.
        temperatures: R of them, the first one ranks.

    Returns:
        Log-probabilities ``[R, B, T, k]``, columns in descending order of their sums, and at the first temperature the
        probability that is kept, ``[B, T]``.
    """
    z = wide(logits)
    first, *others = temperatures
    log_p = _over(z, first).log_softmax(-1)
    columns = log_p.detach().exp().sum(1).topk(k).indices  # [B, k]
    index = columns[:, None].expand(-1, z.shape[1], -1)
    kept = log_p.gather(2, index)
    # log_softmax is one fused pass, unlike logsumexp, and the faster of the two even where k columns are wanted
    others_kept = [_over(z, tau).log_softmax(-1).gather(2, index) for tau in others]
    return torch.stack([kept, *others_kept]), kept.exp().sum(-1)


def sorted_l1(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor]:
    """``[B, T, V_s]`` and ``[B, T, V_t]`` -> L1 distance of the rows' probabilities in descending order, ``[B, T]``."""
    student, teacher = (wide(z).softmax(-1).sort(-1, descending=True).values for z in (student_logits, teacher_logits))
    width = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (F.pad(p, (0, width - p.shape[-1])) for p in (student, teacher))
    return ((student - teacher).abs().sum(-1),)


def _over(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature
