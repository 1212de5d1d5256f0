"""The figures of a benchmark's page: SVG on white, in colours that colour-blind eyes tell apart, marked for grey."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.targets import ITEM_SIZES, OURS, Entry, Problem, Result, bytes_text, number, seconds_text, speedup

WIDTH = 9.6  # inches; a page of GitHub shows it at about its own size
APART = 1.2  # the least ratio of the largest to the smallest vocabulary that makes a curve
INK, PALE = "#222222", "#767676"
STYLE: dict[str, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "grid.color": "#e2e2e2",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",  # text stays text: small files, and it can be selected
    "svg.hashsalt": "mlot_kernels",
}
# Okabe and Ito's palette; colour, marker, hatch. No result has two of cpu, cuda and auto.
LOOKS = {
    "cpu": ("#0072B2", "o", ""),
    "cuda": ("#0072B2", "o", ""),
    "auto": ("#0072B2", "o", ""),
    "triton": ("#009E73", "s", "|||"),
    "reference": ("#666666", "D", "xxx"),
    "eager": ("#E69F00", "^", "///"),
    "torch.compile": ("#D55E00", "v", "\\\\\\"),
    "published": ("#CC79A7", "P", "---"),
}
OTHER_LOOKS = (("#56B4E9", "X", "+++"), ("#000000", "h", "//--"), ("#A6A6A6", "<", "||//"))
DTYPE_LOOKS = dict(zip(ITEM_SIZES, (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), (INK, "D")), strict=True))
EACH = "Each subject at the size with most dtypes and directions, of those the largest"
OPERATORS = Path(__file__).parents[1] / "mlot_kernels" / "ops"  # a folder each; what has none is a loss
TITLES = {"forward": "forward", "backward": "backward", "both": "forward and backward"}


@dataclass(frozen=True)
class Drawing:
    """A figure with what it shows, or no figure and why it is left out; its file is ``<name>.svg``."""

    title: str
    name: str
    figure: Figure | None
    caption: str


def draw(result: Result, folder: Path) -> list[Drawing]:
    """Draw what the result allows into ``folder``, in place of the figures that were there."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        drawings = [_times(result, subject) for subject in ("rank_truncate", "sorted_l1", "multi_level_ot")]
        drawings += [_memory(result), _copy_rate(result), _speedups(result), _errors(result)]
        for drawing in drawings:
            if drawing.figure is not None:  # without a date the same result gives the same bytes
                drawing.figure.savefig(folder / f"{drawing.name}.svg", metadata={"Date": None}, facecolor="white")
    return drawings


def ordered(contenders: Iterable[str]) -> list[str]:
    """Ours, then the peers that most subjects have, then the others by name."""
    known = list(LOOKS)
    return sorted(set(contenders), key=lambda name: (known.index(name) if name in known else len(known), name))


def _of_run(result: Result) -> list[Problem]:
    """The problems on the run's device, each at the most threads that it was measured at."""
    most: dict[tuple[object, ...], Problem] = {}
    for p in sorted((p for p in result.solved if p.device == result.settings["device"]), key=lambda p: p.threads or 0):
        most[p.subject, p.size, p.dtype, p.direction] = p
    return list(most.values())


def _threads(problems: Iterable[Problem]) -> str:
    threads = sorted({p.threads for p in problems if p.threads is not None})
    return f"{' or '.join(map(str, threads))} thread{'' if threads == [1] else 's'}" if threads else "on the GPU"


def _looks(result: Result) -> dict[str, tuple[str, str, str]]:
    names = ordered(name for solved in result.solved.values() for name in solved)
    others = [name for name in names if name not in LOOKS]
    return LOOKS | {name: OTHER_LOOKS[place % len(OTHER_LOOKS)] for place, name in enumerate(others)}


def _vocabulary(problem: Problem) -> int:
    """The student's; 0 where there is none."""
    size = dict(problem.size)
    return size.get("student_vocabulary", size.get("vocabulary", 0))


def _tokens(problem: Problem) -> int:
    size = dict(problem.size)
    return size.get("sequences", 1) * size.get("rows", 1)


def _alike(problems: Iterable[Problem], varies: Callable[[Problem], int], *names: str) -> list[Problem]:
    """Those of one size but for the ``names``, that with most values of ``varies``, then the largest; of two with one
    value the larger.
    """
    groups: dict[tuple[tuple[str, int], ...], dict[tuple[int, str, str], Problem]] = {}
    for p in sorted(problems, key=lambda p: [count for _, count in p.size]):
        rest = tuple((key, count) for key, count in p.size if key not in names)
        groups.setdefault(rest, {})[varies(p), p.dtype, p.direction] = p
    best = max(groups, key=lambda rest: (len({key[0] for key in groups[rest]}), rest), default=None)
    return [] if best is None else sorted(groups[best].values(), key=varies)


def _size_text(problem: Problem, *without: str) -> str:
    return ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in problem.size if key not in without)


def _grid(count: int, height: float, shared: bool = True) -> tuple[Figure, list[Axes]]:
    """``count`` panels of ``height`` inches, at most three beside each other, with one scale where ``shared``."""
    columns = 2 if count == 4 else min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, rows * height + 0.4))
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).flat)
    for spare in panels[count:]:
        spare.set_axis_off()
    for place, axes in enumerate(panels[:count]):
        axes.grid(True, which="major")
        axes.tick_params(labelbottom=place + columns >= count, bottom=place + columns >= count)
    return figure, panels[:count]


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    figure.legend(handles=list(handles), loc="outside upper left", ncols=min(len(handles), 6))


def _lines(result: Result, contenders: Iterable[str], other: str) -> list[Line2D]:
    looks = [(name, *_looks(result)[name]) for name in contenders]
    lines = [Line2D([], [], color=c, marker=m, ms=5, ls=_dashes(name), label=name) for name, c, m, _ in looks]
    return [*lines, Line2D([], [], color=PALE, linestyle=":", label=other)]


def _dashes(contender: str) -> str:
    return "-" if contender in OURS else "--"


def _times(result: Result, subject: str) -> Drawing:
    title, name = f"Time of {subject} against the vocabulary", f"time_{subject}"
    names = ("vocabulary", "student_vocabulary", "teacher_vocabulary")
    of_subject = [p for p in _of_run(result) if p.subject == subject and _vocabulary(p)]
    panels: dict[tuple[str, str], list[Problem]] = {}
    for p in _alike(of_subject, _vocabulary, *names):
        panels.setdefault((p.dtype, p.direction), []).append(p)
    keys = [key for key in _kinds(panels) if _vocabulary(panels[key][-1]) > APART * _vocabulary(panels[key][0])]
    if not keys:
        return Drawing(title, name, None, "it needs two sizes of the vocabulary in the result, a fifth apart")
    figure, grid = _grid(len(keys), 2.7)
    contenders = ordered(name for key in keys for p in panels[key] for name in result.solved[p])
    for axes, (dtype, direction) in zip(grid, keys, strict=True):
        axes.set(xscale="log", yscale="log", title=f"{dtype}, {TITLES[direction]}")
        for contender in contenders:
            entries = _entries(result, panels[dtype, direction], contender)
            points = [(_vocabulary(e.problem), e.seconds) for e in entries if e.seconds]
            _curve(axes, result, contender, [(x, (y.median, y.lower, y.upper)) for x, y in points])
        floors = [(_vocabulary(p), floor) for p in panels[dtype, direction] if (floor := result.floor(p))]
        axes.plot([x for x, _ in floors], [y for _, y in floors], color=PALE, linestyle=":")
    _sizes_axis(grid, sorted({_vocabulary(p) for key in keys for p in panels[key]}))
    _log_axis(grid[0].yaxis, lambda seconds: seconds_text(seconds, "g"))
    figure.supxlabel("columns of the student's vocabulary", fontsize=9)
    figure.supylabel("median time", fontsize=9)
    _legend(figure, _lines(result, contenders, "floor"))
    shown = [p for key in keys for p in panels[key]]
    size = _size_text(shown[0], *names)
    return Drawing(title, name, figure, f"Medians, bars from quartile to quartile; {size}; {_threads(shown)}.")


def _curve(axes: Axes, result: Result, contender: str, points: Sequence[tuple[int, Sequence[float]]]) -> None:
    """A line through each x's value, the first of its numbers; quartiles, where they follow, are bars."""
    colour, marker, _ = _looks(result)[contender]
    x, values = [x for x, _ in points], [numbers[0] for _, numbers in points]
    quartiles = [[n[0] - n[1] for _, n in points if n[1:]], [n[2] - n[0] for _, n in points if n[1:]]]
    bars = quartiles if quartiles[0] else None
    axes.errorbar(x, values, bars, color=colour, marker=marker, markersize=5, linestyle=_dashes(contender), capsize=2)


def _entries(result: Result, problems: Iterable[Problem], contender: str) -> list[Entry]:
    return [entry for p in problems if (entry := result.solved[p].get(contender)) is not None]


def _kinds(found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """dtype and direction, in the order of a page."""
    dtypes, directions = list(ITEM_SIZES), list(TITLES)
    return sorted(found, key=lambda kind: (dtypes.index(kind[0]), directions.index(kind[1])))


def _sizes_axis(grid: Sequence[Axes], sizes: list[int]) -> None:
    """A tick at each size, with its number unless the one before is too near."""
    apart = 0.05 * math.log(sizes[-1] / sizes[0])
    ticks: list[int] = []
    for size in sizes:
        if not ticks or math.log(size / ticks[-1]) > apart:
            ticks.append(size)
    for axes in grid:
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
        if sizes[-1] > 9999:  # long numbers side by side
            axes.tick_params(axis="x", rotation=45)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")


def _log_axis(axis: Axis, text: Callable[[float], str]) -> None:
    """Ticks at 1, 2 and 5 of each decade where there are few decades, else at the decades."""
    low, high = axis.get_view_interval()
    few = high < 100 * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=12))
    axis.set_minor_locator(NullLocator() if few else LogLocator(subs="auto", numticks=12))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _memory(result: Result) -> Drawing:
    title, name = "Peak memory against tokens", "memory"
    groups: dict[tuple[str, str, str], list[Problem]] = {}
    for p in _of_run(result):
        if any(entry.memory and entry.logits for entry in result.solved[p].values()):
            groups.setdefault((p.subject, p.dtype, p.direction), []).append(p)
    alike = {key: _alike(groups[key], _tokens, "sequences", "rows") for key in groups}
    panels = {key: problems for key, problems in alike.items() if len(problems) > 1}
    if not panels:
        return Drawing(title, name, None, "it needs peak memory at two numbers of rows in the result")
    figure, grid = _grid(len(panels), 2.7, shared=False)
    contenders = ordered(c for problems in panels.values() for p in problems for c in result.solved[p])
    for axes, ((subject, dtype, _), problems) in zip(grid, panels.items(), strict=True):
        axes.loglog(base=2)
        axes.set_title(f"{subject}, {dtype}")
        for contender in contenders:
            entries = _entries(result, problems, contender)
            _curve(axes, result, contender, [(_tokens(e.problem), (e.memory,)) for e in entries if e.memory])
        logits = [(_tokens(p), max(e.logits or 0 for e in result.solved[p].values())) for p in problems]
        axes.plot([x for x, _ in logits], [y for _, y in logits], color=PALE, linestyle=":")
        _sizes_axis([axes], [_tokens(p) for p in problems])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: bytes_text(count, "g")))
        axes.tick_params(labelbottom=True, bottom=True)
    figure.supxlabel("tokens (sequences x rows)", fontsize=9)
    figure.supylabel("peak beyond the inputs", fontsize=9)
    _legend(figure, _lines(result, contenders, "the logits among the inputs"))
    return Drawing(title, name, figure, "Peak memory beyond the inputs, the gradient included.")


def _copy_rate(result: Result) -> Drawing:
    title, name = "Share of the copy rate reached", "copy_rate"

    def share(problem: Problem, contender: str) -> float | None:
        entry, rate = result.solved[problem][contender], result.rate("copy", problem.device, problem.threads)
        if contender not in OURS or rate is None or not entry.traffic:
            return None
        return entry.traffic / entry.seconds.median / rate if entry.seconds else math.nan

    figure, caption = _bars(result, share, log=False)
    if figure is None:
        return Drawing(title, name, None, "it needs a copy rate and the bytes that must move in the result")
    figure.supxlabel("bytes that must move over the median time, as a share of the measured copy rate", fontsize=9)
    return Drawing(title, name, figure, caption)


def _speedups(result: Result) -> Drawing:
    title, name = "Speed-up of the best of ours against each peer", "speedup"

    def gain(problem: Problem, contender: str) -> float | None:
        if contender in OURS or not any(entry.ours for entry in result.solved[problem].values()):
            return None
        return speedup(result.best(problem), result.solved[problem][contender]) or math.nan

    figure, caption = _bars(result, gain, log=True)
    if figure is None:
        return Drawing(title, name, None, "it needs a peer's time beside one of ours in the result")
    figure.supxlabel("times as fast as the peer; left of 1 we lose", fontsize=9)
    return Drawing(title, name, figure, caption)


def _bars(result: Result, value: Callable[[Problem, str], float | None], log: bool) -> tuple[Figure | None, str]:
    """One panel per dtype and direction, with a bar from 0 (log: from 1) for each contender that has a value, which is
    NaN where it failed; and a caption.
    """
    problems: dict[tuple[str, str, str], Problem] = {}
    differentiable = {p.subject for p in result.solved if p.direction == "both"}
    for p in _of_run(result):
        direction = p.direction if p.subject in differentiable else "both"  # forward is the whole call
        problems[p.subject, p.dtype, direction] = result.largest(p.subject, p.dtype, p.direction) or p
    values = {
        (*key, contender): found
        for key, p in problems.items()
        for contender in result.solved[p]
        if (found := value(p, contender)) is not None
    }
    measured = [found for found in values.values() if not math.isnan(found)]
    if not measured:
        return None, ""
    rows: list[tuple[str, str | None]] = []  # a subject's title, then its contenders
    shown = {subject for subject, *_ in values}
    for subject in dict.fromkeys(p.subject for p in result.solved if p.subject in shown):
        rows += [(subject, None)] + [(subject, c) for c in ordered(key[3] for key in values if key[0] == subject)]
    kinds = _kinds({key[1:3] for key in values})
    figure, grid = _grid(len(kinds), 0.19 * len(rows) + 0.5)
    for axes, kind in zip(grid, kinds, strict=True):
        axes.set(title=f"{kind[0]}, {TITLES[kind[1]]}", xscale="log" if log else "linear")
        axes.axvline(1, color=INK, linewidth=1)
        axes.grid(False, axis="y")
        for y, (subject, contender) in enumerate(rows):
            key = (subject, *kind, contender)
            if contender is not None and key in values:
                _bar(axes, y, values[key], _looks(result)[contender], log)
    low, high = min(*measured, 1), max(*measured, 1)
    limits = (low / (6 if low < 1 else 1.2), high * 4) if log else (0, high * 1.2)  # room for the numbers
    grid[0].set(xlim=limits, ylim=(len(rows) - 0.4, -0.6))
    grid[0].set_yticks(range(len(rows)), [contender or subject for subject, contender in rows])
    for axes in grid:
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        for label, (_, contender) in zip(axes.get_yticklabels(), rows, strict=False):  # none but at the left
            label.set(fontweight="bold" if contender is None else "normal", fontsize=8.5)
    if log:
        _log_axis(grid[0].xaxis, lambda times: f"{times:g}x")
    else:
        grid[0].xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    without = [subject for subject, _ in rows if subject not in differentiable]
    alone = f"; {', '.join(dict.fromkeys(without))}: forward alone" if without else ""
    return figure, f"{EACH}; {_threads(problems.values())}{alone}."


def _bar(axes: Axes, y: int, value: float, look: tuple[str, str, str], log: bool) -> None:
    """A bar with its number at its end, a loss's in bold, or the word "failed" in its place."""
    start = 1 if log else 0
    text, end = "failed", float(start)
    if not math.isnan(value):
        text, end = (f"{number(value)}x" if log else f"{value:.0%}"), value
        axes.barh(y, end - start, 0.74, left=start, color=look[0], hatch=look[2], edgecolor="white", linewidth=0)
    side, align, weight = (1, "left", "normal") if end >= start else (-1, "right", "bold")
    label = axes.annotate(text, (end, y), (3 * side, 0), textcoords="offset points", ha=align, va="center_baseline")
    label.set(fontsize=8, fontweight=weight, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4})


def _errors(result: Result) -> Drawing:
    title, name = "Error of the losses' gradient", "errors"
    worst: dict[tuple[str, str, str], float] = {}
    for p, solved in result.solved.items():
        for contender, entry in solved.items():
            error = (entry.errors or {}).get("gradient")
            if not (OPERATORS / p.subject).is_dir() and entry.seconds is not None and error is not None:
                key = (p.subject, contender, p.dtype)
                worst[key] = max(error, worst.get(key, 0.0))
    if not any(worst.values()):
        return Drawing(title, name, None, "it needs the error of a loss's gradient in the result")
    subjects = list(dict.fromkeys(subject for subject, *_ in worst))
    contenders = ordered(contender for _, contender, _ in worst)
    dtypes = [dtype for dtype in ITEM_SIZES if any(dtype == key[2] for key in worst)]
    figure, grid = _grid(len(subjects), 0.36 * len(contenders) + 0.7)
    least = min(error for error in worst.values() if error > 0)
    for axes, subject in zip(grid, subjects, strict=True):
        axes.set(title=subject, xscale="log", ylim=(len(contenders) - 0.5, -0.5))
        for dtype in dtypes:
            found = [(worst.get((subject, contender, dtype)), y) for y, contender in enumerate(contenders)]
            shown = [(error, y) for error, y in found if error]
            colour, marker = DTYPE_LOOKS[dtype]
            axes.plot([x for x, _ in shown], [y for _, y in shown], color=colour, marker=marker, linestyle="")
            for y in [y for error, y in found if error == 0]:
                axes.annotate(f"{dtype}: 0", (least, y), fontsize=8, va="center")
        axes.set_yticks(range(len(contenders)), contenders)
    _log_axis(grid[0].xaxis, lambda error: f"{error:.0e}")
    figure.supxlabel("largest difference to float64 over the largest magnitude", fontsize=9)
    looks = [(dtype, *DTYPE_LOOKS[dtype]) for dtype in dtypes]
    _legend(figure, [Line2D([], [], color=c, marker=marker, linestyle="", label=dtype) for dtype, c, marker in looks])
    return Drawing(title, name, figure, "The largest over all sizes, against the gradient of the same sum in float64.")
