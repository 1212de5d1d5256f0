"""``python -m bench.gold_table``: GOLD's hybrid loss beside TRL's own class, and the alignment of tokens alone.

Forward and backward of one sequence, tokens aligned and merged within the call, medians of some turns (TRL's class
takes a minute for one turn of the larger size, and has fewer); the contenders meet the machine in turns. Peak: the most
that the resident set grows beyond the inputs, over the size of the student's gradient. A value that differs from ours
by more than 1e-3 of it stops everything. Without TRL its columns are empty.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import memory
from bench.bench_hybrid import SUITE
from bench.suite import Measurement
from mlot_kernels import align_byte_offsets

DTYPES = (torch.float32, torch.bfloat16)
VOCABULARY = 131_072
HAS_TRL = importlib.util.find_spec("trl") is not None


def contenders() -> dict[str, Callable[..., tuple[torch.Tensor, ...]]]:
    calls = {"ours": lambda *inputs: SUITE.ours(*inputs, backend=None), "eager": SUITE.peers["eager"].call}
    return calls | ({"TRL": SUITE.peers["TRL"].call} if HAS_TRL else {})


def seconds_of(rows: int, dtype: torch.dtype, turns: int, turns_of_trl: int) -> dict[str, list[float]]:
    """Forward and backward in every turn."""
    size = {"sequences": 1, "rows": rows, "student_vocabulary": VOCABULARY, "teacher_vocabulary": VOCABULARY}
    inputs = SUITE.inputs(dtype, "cpu", **size)
    inputs[0].requires_grad_()
    calls = contenders()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    values: dict[str, float] = {}
    for turn in track(range(turns + 1), f"{rows} tokens, {dtype}", transient=True):
        for name, call in calls.items():
            if name == "TRL" and turn > turns_of_trl:
                continue
            start = time.perf_counter()
            (value,) = call(*inputs)
            value.sum().backward()
            took = time.perf_counter() - start
            inputs[0].grad = None
            values[name] = value.item()
            if turn or (name == "TRL" and turns_of_trl == 0):  # the first one warms up
                seconds[name].append(took)
    for name, value in values.items():
        if not abs(value - values["ours"]) <= 1e-3 * abs(values["ours"]):
            raise ValueError(f"{name} gives {value}, ours {values['ours']}")
    return seconds


def peak_of(name: str, rows: int, dtype: torch.dtype) -> float:
    """Over the gradient's size."""
    size = {"sequences": 1, "rows": rows, "student_vocabulary": VOCABULARY, "teacher_vocabulary": VOCABULARY}
    contender = "cpu" if name == "ours" else name
    threads = torch.get_num_threads()
    measurement = Measurement(SUITE, contender, tuple(size.items()), dtype, "both", "cpu", threads)
    return memory.peak(measurement) / (rows * VOCABULARY * dtype.itemsize)


def losses(rows: Sequence[int], turns: int, turns_of_trl: int) -> Table:
    table = Table(title=f"Hybrid loss, V = {VOCABULARY:,}, {torch.get_num_threads()} threads: ms (least to most), peak")
    names = list(contenders())
    for heading in ("tokens", "dtype", *names, *(f"peak, {name}" for name in names)):
        table.add_column(heading, justify="right")
    for A in rows:
        for dtype in DTYPES:
            seconds = seconds_of(A, dtype, turns, turns_of_trl)
            own = statistics.median(seconds["ours"])
            cells = []
            for name, taken in seconds.items():
                median = statistics.median(taken)
                ratio = "" if name == "ours" else f", {median / own:.1f}x ours"
                cells.append(f"{1e3 * median:,.0f} ({1e3 * min(taken):,.0f} to {1e3 * max(taken):,.0f}){ratio}")
            # TRL's larger runs hold a dozen times the gradient.
            peaks = [f"{peak_of(name, A, dtype):.2f}" for name in names]
            table.add_row(str(A), str(dtype).removeprefix("torch."), *cells, *peaks)
    return table


def alignments(turns: int) -> Table:
    """64 sequences of 2048 tokens on either side."""
    size = {"sequences": 64, "rows": 2048, "student_vocabulary": 2, "teacher_vocabulary": 2}
    _, _, _, _, student, teacher, _ = SUITE.inputs(torch.float32, "cpu", **size)
    calls: dict[str, Callable[[], object]] = {"ours": lambda: align_byte_offsets(student, teacher)}
    if HAS_TRL:
        from trl.experimental.gold.gold_trainer import ULDLoss

        calls["TRL"] = lambda: [
            ULDLoss._align_by_byte_offsets(s.tolist(), t.tolist()) for s, t in zip(student, teacher, strict=True)
        ]
    table = Table("", "ms (least to most)", title="Alignment of 64 sequences of 2,048 tokens")
    for name, call in calls.items():
        call()
        taken = []
        for _ in range(3 * turns):
            start = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - start))
        table.add_row(name, f"{statistics.median(taken):.1f} ({min(taken):.1f} to {max(taken):.1f})")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gold_table", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 512], help="answer tokens")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--turns-of-trl", type=int, default=1, help="0: its first call counts")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    console.print(alignments(options.turns))
    console.print(losses(options.rows, options.turns, options.turns_of_trl))


if __name__ == "__main__":
    main()
