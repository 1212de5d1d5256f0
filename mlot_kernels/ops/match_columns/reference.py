"""The definition, in plain torch: what every other backend is held against. Indices have no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlot_kernels.checks import accumulator
from mlot_kernels.logits import Side, log_probabilities

METHODS = ("greedy", "optimal")


@torch.no_grad()
def match_columns(*arguments: Any) -> Tensor:
    """The columns ``[B, k]``; arguments as in the schema."""
    *side, teacher, method = arguments
    cost = costs(Side(*side), teacher)
    return optimal(cost) if method == "optimal" else greedy(cost)


def costs(student: Side, teacher: Tensor) -> Tensor:
    """D ``[B, k, vocab_size]`` for the teacher's log-probabilities ``[B, A, k]``.

    inf at columns that are not looked at; NaN in all of a sequence with a NaN in a counted row.
    """
    behind = (student.row_index < 0)[..., None]
    dtype = accumulator(torch.promote_types(student.values.dtype, teacher.dtype))
    s, t = (  # [B, A, V], [B, A, k]
        log_p.to(dtype).exp().masked_fill(behind, 0) for log_p in (log_probabilities(*student), teacher)
    )
    D = torch.cdist(t.transpose(1, 2), s.transpose(1, 2), p=1)
    if student.column_mask is not None:
        D.masked_fill_(~student.column_mask[: student.vocab_size], float("inf"))
    return D.add_(((s.sum((1, 2)) + t.sum((1, 2))) * 0)[:, None, None])


def greedy(D: Tensor) -> Tensor:
    """The columns ``[B, k]``. Overwrites ``D``."""
    columns = []
    for i in range(D.shape[1]):
        lowest, column = D[:, i].min(-1)  # [B]; the first of equals
        columns.append(column.masked_fill(~lowest.isfinite(), -1))
        D.scatter_(2, column[:, None, None].expand(-1, D.shape[1], 1), float("inf"))  # taken
    return torch.stack(columns, 1)


def optimal(D: Tensor) -> Tensor:
    """The columns ``[B, k]``."""
    columns = [assignment(cost) for cost in D.double().cpu()]
    return torch.stack(columns).to(D.device) if columns else D.new_empty(D.shape[:2], dtype=torch.int64)


def assignment(cost: Tensor) -> Tensor:
    """The columns ``[k]`` of one sequence, whose costs ``[k, vocab_size]`` are on the CPU."""
    linear_sum_assignment = _scipys_assignment()
    columns, costs = torch.full(cost.shape[:1], -1), cost.numpy()
    (free,) = (costs[0] < float("inf")).nonzero()  # none where all are NaN
    rows, chosen = linear_sum_assignment(costs[:, free])
    columns[torch.from_numpy(rows)] = torch.from_numpy(free[chosen])
    return columns


def _scipys_assignment() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "method='optimal' needs SciPy: pip install 'mlot-kernels[optimal]'; or pass method='greedy'"
        ) from error
    return linear_sum_assignment
