"""A call of every operator of logits, for logits so many that 32 bits cannot count them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mlot_kernels import (
    Logits,
    Rows,
    rank_truncate,
    row_divergence,
    row_entropy,
    soft_rank,
    sorted_l1,
    token_log_probability,
    topk_softmax,
)
from mlot_kernels.cases import Outputs

CALLS: dict[str, tuple[str, Callable[[Tensor, Rows, str], Outputs]]] = {
    "entropy": ("row_entropy", lambda x, rows, backend: (row_entropy(Logits(x, rows), backend=backend),)),
    "log-probability of a token": (
        "token_log_probability",
        lambda x, rows, backend: (
            token_log_probability(Logits(x, rows), (7 * rows.counted).cumsum(1) % x.shape[2], backend=backend),
        ),
    ),
    "20 columns of each row": (
        "topk_softmax",
        lambda x, rows, backend: tuple(topk_softmax(Logits(x, rows), 20, backend=backend)),
    ),
    "20 columns of each sequence": (
        "rank_truncate",
        lambda x, rows, backend: tuple(rank_truncate(Logits(x, rows), k=20, backend=backend)),
    ),
    "20 entries of each row": ("soft_rank", lambda x, _, backend: (ends(soft_rank(x[..., :20], backend=backend)),)),
    "large student": (
        "sorted_l1",
        lambda x, rows, backend: (sorted_l1(Logits(x, rows), _other_side(x, rows), backend=backend),),
    ),
    "large teacher": (
        "sorted_l1",
        lambda x, rows, backend: (sorted_l1(_other_side(x, rows), Logits(x, rows), backend=backend),),
    ),
    "divergence of a large student": (
        "row_divergence",
        lambda x, rows, backend: (
            row_divergence(Logits(x, rows), _other_side(x, rows, x.shape[2]), kind="jsd", backend=backend),
        ),
    ),
    "divergence from a large teacher": (
        "row_divergence",
        lambda x, rows, backend: (
            row_divergence(_other_side(x, rows, x.shape[2]), Logits(x, rows), kind="jsd", backend=backend),
        ),
    ),
}


def _other_side(x: Tensor, rows: Rows, columns: int = 1000) -> Tensor:
    shape = (*rows.index.shape, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(x)


def ends(x: Tensor) -> Tensor:
    """The first and the last three rows of each sequence."""
    return torch.cat((x[:, :1], x[:, -3:]), 1)
