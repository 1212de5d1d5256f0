"""The main loss against its definition in float64 and against hand-written PyTorch, on given logits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import mlot_kernels as mlot
from bench.baselines.multi_level_ot import published_loss, tidied_paper_loss
from examples.training import Both

TOLERANCES = {"value": 1e-5, "gradient": 1e-4, "by_hand": 1e-4}  # relative


@dataclass(frozen=True)
class Measured:
    """One implementation, forward and backward.

    Attributes:
        peak_mebibytes: the most that was allocated at a time beyond the inputs, the gradient included.
    """

    name: str
    value: float
    milliseconds: float
    peak_mebibytes: float


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        backend: the backend that ``rank_truncate`` ran on, the operator that reads the logits.
        shapes: of the student's and the teacher's logits.
        rows: how many pairs of rows the batch has.
        differences: relative, keys as ``TOLERANCES``: the value and the gradient (norm of the difference over the norm)
            against float64, and the value against ``tidied_paper_loss``.
        measured: ours, ours in float64, the paper's loss by hand, the published loss.
    """

    backend: str
    shapes: tuple[list[int], list[int]]
    rows: int
    differences: dict[str, float]
    measured: list[Measured]

    @property
    def passed(self) -> bool:
        return all(self.differences[name] <= tolerance for name, tolerance in TOLERANCES.items())


def check(both: Both, repeats: int) -> Check:
    """Compare the implementations on the logits of a batch."""
    loss = mlot.MultiLevelOTLoss.paper()
    student_logits, teacher_logits = both.student_logits.detach(), both.teacher_logits
    student_rows, teacher_rows = both.rows()

    def ours(student: Tensor) -> Tensor:
        return loss(student, teacher_logits, student_rows, teacher_rows)

    def definition(student: Tensor) -> Tensor:
        with mlot.use_backend("reference"):
            return loss(student, teacher_logits.double(), student_rows, teacher_rows)

    def by_hand(student: Tensor) -> Tensor:
        return tidied_paper_loss(student, teacher_logits, student_rows, teacher_rows)

    # Knows no gaps: it takes as many adjacent rows as labels count, the same amount of work.
    def published(student: Tensor) -> Tensor:
        return published_loss(student, teacher_logits, both.student.labels, both.teacher.labels)

    measured = [
        _measure("MultiLevelOTLoss.paper()", ours, student_logits, repeats),
        _measure("the same in float64, reference", definition, student_logits.double(), repeats),
        _measure("paper's loss in plain PyTorch", by_hand, student_logits, repeats),
        _measure("published loss in plain PyTorch", published, student_logits, repeats),
    ]
    gradient, exact = _gradient(ours, student_logits), _gradient(definition, student_logits.double())
    value, expected, tidied, _ = (m.value for m in measured)
    differences = {
        "value": abs(value - expected) / abs(expected),
        "gradient": float((gradient.double() - exact).norm() / exact.norm()),
        "by_hand": abs(value - tidied) / abs(tidied),
    }
    explanation = mlot.explain(mlot.rank_truncate, mlot.Logits(student_logits, rows=student_rows), k=50)
    shapes = list(student_logits.shape), list(teacher_logits.shape)
    return Check(explanation.chosen, shapes, int(student_rows.count.sum()), differences, measured)


def _gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(logits), logits)
    return gradient


def _measure(name: str, function: Callable[[Tensor], Tensor], logits: Tensor, repeats: int) -> Measured:
    on_gpu = logits.device.type == "cuda"
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        _gradient(function, logits)
        if on_gpu:
            torch.cuda.synchronize(logits.device)
        times.append(time.perf_counter() - start)
    peak = _peak_bytes_gpu(function, logits) if on_gpu else peak_bytes_cpu(lambda: _gradient(function, logits))[1]
    with torch.no_grad():
        value = float(function(logits))
    return Measured(name, value, 1e3 * statistics.median(times[1:]), peak / 2**20)


def _peak_bytes_gpu(function: Callable[[Tensor], Tensor], logits: Tensor) -> int:
    torch.cuda.reset_peak_memory_stats(logits.device)
    before = torch.cuda.memory_allocated(logits.device)
    _gradient(function, logits)
    return torch.cuda.max_memory_allocated(logits.device) - before


def peak_bytes_cpu(call: Callable[[], Any]) -> tuple[Any, int]:
    """What ``call`` returns, and the highest running sum of what PyTorch's allocator reports to the profiler meanwhile,
    C++ kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = call()
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return made, peak
