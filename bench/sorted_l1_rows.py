"""``python -m bench.sorted_l1_rows``: what rows that are hard to order cost ``sorted_l1``, beside the usual ones.

Prints, for each kind of rows and dtype, the time of forward and backward per element and how many times the usual rows'
it is; the usual rows are those of the other benchmarks. Kinds meet the machine in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mlot_kernels import sorted_l1
from mlot_kernels.cases import large_logits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Shape = tuple[int, int, int]


def usual(side: int, shape: Shape) -> Tensor:
    return large_logits(torch.float32, "cpu", side, *shape)


def normal(side: int, shape: Shape) -> Tensor:
    return 2 * torch.randn(shape)


def near_uniform(side: int, shape: Shape) -> Tensor:
    return 0.02 * torch.randn(shape)


def ties(side: int, shape: Shape) -> Tensor:
    return torch.randint(-3, 3, shape).float()


KINDS: dict[str, tuple[Callable[[int, Shape], Tensor], bool]] = {  # and whether both vocabularies are the student's
    "usual": (usual, False),
    "normal, zero mean: most distinct values": (normal, False),
    "near uniform": (near_uniform, False),
    "ties everywhere": (ties, False),
    "near uniform, one vocabulary": (near_uniform, True),
    "a row against itself": (lambda side, shape: usual(0, shape), True),
}


def measure(
    vocabularies: tuple[int, int], dtype: torch.dtype, rows: int, turns: int, backend: str
) -> dict[str, list[float]]:
    """Seconds per element of both rows, forward and backward, in every turn."""
    torch.manual_seed(0)
    pairs = {}
    for name, (draw, same) in KINDS.items():
        student, teacher = (draw(i, (2, rows, vocabularies[0 if same else i])).to(dtype) for i in range(2))
        pairs[name] = student.requires_grad_(), teacher
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    for turn in range(turns + 1):
        for name, (student, teacher) in pairs.items():
            start = time.perf_counter()
            sorted_l1(student, teacher, backend=backend).sum().backward(inputs=student)
            if turn:  # the first one warms up
                seconds[name].append((time.perf_counter() - start) / (student.numel() + teacher.numel()))
            student.grad = None
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sorted_l1_rows", description=__doc__)
    parser.add_argument("--vocabularies", type=int, nargs=2, default=[128_256, 151_936], metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--rows", type=int, default=16, help="of each of two sequences")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--backend", default="cpu")
    options = parser.parse_args(arguments)
    sizes = " and ".join(f"{V:,}" for V in options.vocabularies)
    table = Table(title=f"sorted_l1, {sizes} columns, {torch.get_num_threads()} threads: ns per element (x usual)")
    table.add_column("rows")
    columns = []
    for dtype in DTYPES:
        table.add_column(str(dtype).removeprefix("torch."), justify="right")
        seconds = measure(tuple(options.vocabularies), dtype, options.rows, options.turns, options.backend)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        columns.append([f"{1e9 * m:.2f} ({m / medians['usual']:.1f})" for m in medians.values()])
    for name, *cells in zip(KINDS, *columns, strict=True):
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
