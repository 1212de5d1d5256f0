"""Which student columns meet a teacher's k columns: those whose probabilities are nearest over all rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.backends import refusing
from mlot_kernels.logits import Logits, Prepared, Ranked, prepare
from mlot_kernels.native import native
from mlot_kernels.ops.match_columns import reference
from mlot_kernels.registry import lazy, plain_operator

_greedy, _costs = (native("cpu", f"match_columns_{name}") for name in ("greedy", "costs"))


@torch.no_grad()
def _on_cpu(*arguments: Any) -> Tensor:
    """Costs and the greedy choice in C++; an assignment is SciPy's, of one sequence's costs at a time."""
    values, index, column_mask, log_scale, *options, teacher, method = arguments
    if method == "greedy":
        return _greedy(values, index, column_mask, log_scale, *options, teacher)
    columns = index.new_empty((teacher.shape[0], teacher.shape[2]))
    for b, one in enumerate(columns):
        scale = None if log_scale is None else log_scale[b : b + 1]
        cost = _costs(values[b : b + 1], index[b : b + 1], column_mask, scale, *options, teacher[b : b + 1])
        one.copy_(reference.assignment(cost[0]))
    return columns


FORWARD = {
    "reference": reference.match_columns,
    "cpu": refusing(_on_cpu, getattr(_greedy, "refuses", lambda *_: None)),
    "triton": lazy("mlot_kernels.ops.match_columns.triton_kernels", "match_columns"),
}


def _fake(values: Tensor, index: Tensor, *rest: Any) -> Tensor:
    teacher = rest[5]
    return index.new_empty((teacher.shape[0], teacher.shape[2]))


_operator = plain_operator(
    "match_columns(Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, float temperature, "
    "bool standardize, SymInt vocab_size, Tensor teacher, str method, str backend) -> Tensor columns",
    fake=_fake,
    implementations=FORWARD,
)


def match_columns(
    student: Tensor | Logits, teacher: Ranked, *, method: str = "greedy", backend: str | None = None
) -> Tensor:
    """The student columns that the teacher's k columns are compared with, each taken once.

    With t and s the two sides' probabilities and the sum over the counted rows, column j costs column i::

        D_ij = sum_a |t_i(a) - s_j(a)|

    Multi-Level-OT (arXiv 2412.14528, Eq. 11) takes the cheapest of all permutations of the whole vocabulary and cuts
    both sides at k afterwards. This is an approximation of it: only the teacher's k columns look for partners, and what
    the other columns would have taken is free.

    Args:
        student: ``[B, T, V]`` or ``[N, V]``, float16, bfloat16, float32 or float64, or ``Logits``; its rows say which
            count. Columns from ``vocab_size`` on and those that ``columns`` leaves out are not taken.
        teacher: as ``rank_truncate`` and ``gather_columns`` return it, with the same columns for all rows of a
            sequence; only ``log_probabilities[0]`` is compared. Row a of one side meets row a of the other, as those
            that ``pair`` returns; its rows beyond the student's count are not read. Without the B dimension for
            ``[N, V]``.
        method: ``"greedy"``: the teacher's columns choose in their order, each the free column that costs it least, the
            lower index first among equals. ``"optimal"``: an assignment with the least sum of costs, SciPy's choice
            where there are several; needs SciPy (``pip install 'mlot-kernels[optimal]'``) and waits for the device.
        backend: run on this backend or raise; by default the best one for the device.

    Returns:
        int64 ``[B, k]`` (``[k]`` for ``[N, V]``), for ``gather_columns``: the student column that meets each teacher
        column; constants, without a gradient. 0, 1, 2, ... where no row counts. -1, which ``gather_columns`` turns into
        NaN, in all of a sequence with NaN in a counted row of either side, and where ``columns`` leaves too few.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or value; k is above the student's
            vocabulary.
        ImportError: ``method="optimal"`` without SciPy.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    s = prepare(student, "student")
    log_t = _compared(teacher, s)
    checks.choice("method", method, reference.METHODS)
    return s.restore(_operator(*s.side, log_t, method, backend=backend))


def _compared(teacher: Any, s: Prepared) -> Tensor:
    """The teacher's log-probabilities at its first temperature, ``[B, A, k]``."""
    if not isinstance(teacher, Ranked):
        raise TypeError(
            f"teacher must be Ranked, got {type(teacher).__name__}; make it with rank_truncate or gather_columns"
        )
    shape = "[R, A, k]" if s.one_sequence else "[R, B, A, k]"
    log_t = checks.tensor("teacher.log_probabilities", teacher.log_probabilities, shape)
    checks.tensor("teacher.columns", teacher.columns, "[k] or [B, k] or [B, A, k]", (torch.int64,))
    if teacher.columns.dim() >= log_t.dim() - 1:
        raise ValueError(
            "teacher.columns must be the same for all rows of a sequence, got shape "
            f"{tuple(teacher.columns.shape)}; rank with scope='sequence' or scope='batch'"
        )
    checks.integer("the number of the teacher's temperatures", log_t.shape[0], 1)
    if s.one_sequence:
        log_t = log_t.unsqueeze(1)
    R, k = log_t.shape[0], log_t.shape[3]
    checks.sized(
        "teacher.log_probabilities", log_t, (R, *s.side.row_index.shape, k), f"{shape} with the student's rows"
    )
    checks.integer("k", k, 1, s.side.vocab_size, "the student's vocabulary")
    checks.same_device(student=s.side.values, teacher=log_t)
    return log_t[0]
