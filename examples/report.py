"""What the example prints and draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import SubFigure
from rich import box
from rich.console import Console
from rich.table import Table

from examples.check import TOLERANCES, Check
from examples.corpus import Corpus
from examples.training import Plan, Run

INK, BLUE, GREY = "#333333", "#1f5a92", "#a9a9a9"
STYLE = {
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "xtick.color": INK,
    "ytick.color": INK,
}


def print_corpus(console: Console, corpus: Corpus, teacher_size: int, student_size: int) -> None:
    console.print(
        f"Text     {sum(map(len, corpus.train)):,} characters of Python's documentation and docstrings"
        f"\nTeacher  {teacher_size:,} parameters, {corpus.teacher.vocabulary:,} byte-level BPE tokens"
        f"\nStudent  {student_size:,} parameters, {corpus.student.vocabulary:,} Unigram tokens"
        f"\nRows     those where both tokenizations end: {corpus.aligned:.0%} of the student's"
    )


def print_check(console: Console, found: Check) -> None:
    table = _table("One loss on one held-out batch, forward and backward", "", "value", "median ms", "peak MiB")
    for row in found.measured:
        table.add_row(row.name, f"{row.value:.5f}", f"{row.milliseconds:.1f}", f"{row.peak_mebibytes:.1f}")
    console.print()
    console.print(table)
    console.print(
        f"\nLogits: student {found.shapes[0]}, teacher {found.shapes[1]}; {found.rows} pairs of rows."
        "\nPeak: the most that PyTorch's allocator held at a time beyond the inputs,"
        "\nthe gradient included. The published loss and the paper's are different"
        "\nlosses of different values: only time and memory compare.\n",
        markup=False,
    )
    names = {
        "value": "value against float64",
        "gradient": "gradient against float64",
        "by_hand": "value against the paper's loss by hand",
    }
    for key, tolerance in TOLERANCES.items():
        difference = found.differences[key]
        verdict = "ok" if difference <= tolerance else "[bold red]FAILED[/]"
        console.print(f"  {names[key]:<38}  {difference:.1e}, at most {tolerance:.0e}: {verdict}")
    note = " (plain PyTorch; no kernel of this package ran)" if found.backend == "reference" else ""
    console.print(f"\nBackend: {found.backend}{note}.\n")


def print_runs(console: Console, alone: Run, runs: Sequence[Run], results: dict[str, Any], output: Path) -> None:
    headers = ("student trained with", "loss\nbefore", "\nafter", "without\nit", "CE per\ntoken", "per\nchar.", "\ns")
    table = _table(f"Held-out text before and after {alone.steps[-1]} steps", *headers)
    for name, run, step in (("(before)", alone, 0), (alone.name, alone, -1), *((run.name, run, -1) for run in runs)):
        own = run.distillation[name] if run is not alone else None
        table.add_row(
            name,
            f"{own[0]:.4g}" if own else "",
            f"[bold red]{own[-1]:.4g}[/]" if run.fell is False else f"{own[-1]:.4g}" if own else "",
            f"{alone.distillation[name][-1]:.4g}" if own else "",
            f"{run.cross_entropy_per_token[step]:.3f}",
            f"{run.cross_entropy_per_character[step]:.3f}",
            f"{run.seconds:.0f}" if step else "",
        )
    teacher = results["teacher"]["cross_entropy_per_token"]
    console.print()
    console.print(table)
    console.print(
        "\nWithout it: the loss after cross-entropy alone. CE: cross-entropy in nats, over"
        f"\nthe counted rows; the teacher's is {teacher:.3f} per token of its own."
        "\nA run this small shows that the losses fall; it proves nothing about quality."
        f"\n\n{output / 'results.json'}, {output / 'distill.png'}\nwritten after {results['seconds']:.0f} seconds. "
        + ("All checks passed." if results["passed"] else "[bold red]Failed: see the figures in red.[/]")
    )


def _table(title: str, name: str, *figures: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column(name, no_wrap=True)
    for header in figures:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def draw(path: Path, alone: Run, runs: Sequence[Run], plan: Plan) -> None:
    """One panel per loss, and the transport plan as a heat map."""
    columns = 1 if len(runs) < 4 else 2
    lines = math.ceil(len(runs) / columns)
    with plt.rc_context(STYLE):
        whole = plt.figure(figsize=(7.2 + 3.2 * columns, max(5.8, 2.0 * lines + 0.4)), layout="constrained")
        left, right = whole.subfigures(1, 2, width_ratios=(3.2 * columns, 7.2), wspace=0.03)
        panels = left.subplots(lines, columns, squeeze=False, sharex=True).flat
        for panel, run in zip(panels, runs, strict=False):
            _panel(panel, run, alone)
        for panel in left.axes[len(runs) :]:
            panel.set_axis_off()
        for panel in left.axes[max(0, len(runs) - columns) : len(runs)]:
            panel.tick_params(labelbottom=True)
        left.axes[0].legend(frameon=False, handlelength=1.2)
        left.supxlabel("steps", fontsize=8.5)
        left.suptitle("Held-out value of each loss", fontsize=11, x=0.02, ha="left")
        _heat_map(right, plan)
        whole.savefig(path, dpi=150)
        plt.close(whole)


def _panel(panel: Axes, run: Run, alone: Run) -> None:
    panel.plot(alone.steps, alone.distillation[run.name], color=GREY, label="cross-entropy alone")
    panel.plot(run.steps, run.distillation[run.name], color=BLUE, label="with the loss")
    panel.set_title(run.name)
    panel.margins(x=0.02, y=0.15)


def _heat_map(part: SubFigure, plan: Plan) -> None:
    axes = part.subplots()
    even = 1 / len(plan.teacher_tokens)
    shares = [[mass / even for mass in row] for row in plan.mass]
    farthest = max(abs(share - 1) for row in shares for share in row)
    scale = CenteredNorm(vcenter=1, halfrange=min(1, farthest))  # no share is below 0
    image = axes.imshow(shares, cmap="RdBu", norm=scale, aspect="auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(range(len(plan.student_tokens)), map(_visible, plan.student_tokens), rotation=90)
    axes.set_yticks(range(len(plan.teacher_tokens)), map(_visible, plan.teacher_tokens))
    axes.set_xlabel("student's prediction after")
    axes.set_ylabel("teacher's prediction after")
    bar = part.colorbar(
        image, shrink=0.5, aspect=30, pad=0.02, label="times an even share", extend="max" if farthest > 1 else "neither"
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    part.suptitle("Transport plan on a held-out sentence", fontsize=11, x=0.02, ha="left")
    axes.set_title("Where the student's predictions (columns) go among the teacher's (rows)")


def _visible(token: str) -> str:
    """Spaces shown; a dollar sign would begin a formula."""
    return token.replace(" ", "·").replace("$", r"\$")
