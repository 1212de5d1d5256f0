"""A page and its figures from a stored benchmark result: ``python -m bench.report bench/results/<machine>.json``."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.figures import Drawing, draw, ordered
from bench.targets import (
    DIRECTIONS,
    GPU,
    ITEM_SIZES,
    MACHINE,
    OURS,
    SIZES,
    Entry,
    Previous,
    Problem,
    Result,
    Seconds,
    bytes_text,
    judge,
    load,
    number,
    one_of,
    seconds_text,
    speedup,
    unit_of_time,
)

FORMAT = 1
TOP = ("machine", "commit", "date", "versions", "settings", "command", "results", "previous")
PROBLEM = ("subject", "size", "dtype", "direction", "device", "threads")
ENTRY = ("contender", "output", "input_sets", "traffic", "logits", "memory", "errors", "failure")
WIDE = 0.3  # of the median; a wider spread is marked
WORST = 10  # medians that moved, listed


def read(path: Path) -> Result:
    """Read a stored result.

    Raises:
        ValueError: it has another format number, a key is missing or a value is none of those that the format knows.
    """
    stored = json.loads(path.read_text())
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        found = stored.get("format") if isinstance(stored, dict) else type(stored).__name__
        raise ValueError(f"{path}: format must be {FORMAT}, got {found!r}; measure again to write it anew")
    try:
        return _result(stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; measure again to write it anew") from None


def _result(stored: Mapping[str, Any]) -> Result:
    machine, commit, date, versions, settings, command, results, previous = _take("the result", stored, TOP)
    _take("machine", machine, MACHINE)
    if machine["gpu"] is not None:
        _take("machine's gpu", machine["gpu"], GPU)
    _take("commit", commit, ("id", "dirty"))
    _take("settings", settings, ("suite", "device", "turns"))
    rates: dict[tuple[str, str, int | None], Entry] = {}
    solved: dict[Problem, dict[str, Entry]] = {}
    for place, each in enumerate(results):
        entry = _entry(f"results[{place}]", each)
        problem = entry.problem
        if problem.subject == "machine":
            taken = rates.setdefault((entry.contender, problem.device, problem.threads), entry)
        else:
            taken = solved.setdefault(problem, {}).setdefault(entry.contender, entry)
        if taken is not entry:
            raise ValueError(f"results[{place}]: a second {problem.subject} of {entry.contender} at the same problem")
    before = None if previous is None else _previous(previous)
    return Result(machine, commit, date, versions, settings, command, before, rates, solved)


def _previous(stored: Mapping[str, Any]) -> Previous:
    commit, date, settings, results = _take("previous", stored, ("commit", "date", "settings", "results"))
    _take("previous commit", commit, ("id", "dirty"))
    timed: dict[tuple[Problem, str], Seconds] = {}
    for place, entry in enumerate(results):
        where = f"previous results[{place}]"
        (contender,) = _take(where, entry, ("contender",))
        problem, seconds = _problem(where, entry), _seconds(where, entry)
        if seconds is not None:
            timed[problem, contender] = seconds
    return Previous(commit, date, settings, timed)


def _entry(where: str, stored: Mapping[str, Any]) -> Entry:
    problem, seconds = _problem(where, stored), _seconds(where, stored)
    values = dict(zip(ENTRY, _take(where, stored, ENTRY), strict=True))
    if values["errors"] is not None:
        _take(f"{where}: errors", values["errors"], ("value", "gradient"))
    if seconds is None and values["failure"] is None:
        raise ValueError(f"{where}: there are neither seconds nor a failure, expected one of them")
    return Entry(problem=problem, seconds=None if values["failure"] else seconds, **values)


def _problem(where: str, stored: Mapping[str, Any]) -> Problem:
    subject, size, dtype, direction, device, threads = _take(where, stored, PROBLEM)
    if subject != "machine":  # whose rates have no dtype or direction of ours
        one_of(f"{where}: dtype", dtype, ITEM_SIZES)
        one_of(f"{where}: direction", direction, DIRECTIONS)
    known = [name for name in SIZES if name in size] + sorted(name for name in size if name not in SIZES)
    return Problem(subject, tuple((name, size[name]) for name in known), dtype, direction, device, threads)


def _seconds(where: str, stored: Mapping[str, Any]) -> Seconds | None:
    (seconds,) = _take(where, stored, ("seconds",))
    if seconds is None:
        return None
    return Seconds(*_take(f"{where}: seconds", seconds, ("median", "lower", "upper", "rounds")))


def _take(where: str, stored: Mapping[str, Any], keys: Sequence[str]) -> list[Any]:
    missing = [key for key in keys if key not in stored]
    if missing:
        raise ValueError(f"{where}: no key {', '.join(map(repr, missing))}; format {FORMAT} has {', '.join(keys)}")
    return [stored[key] for key in keys]


def page(result: Result, name: str, drawings: Sequence[Drawing]) -> str:
    """The Markdown page of ``result``, whose file is ``<name>.json`` and whose figures lie in ``<name>/``."""
    subjects = dict.fromkeys(problem.subject for problem in result.solved)
    parts = [_head(result, name), _rates(result), _repeatability(result), _targets(result), READING]
    parts += [_subject(result, subject) for subject in subjects]
    parts += ["## Figures\n", *(_figure(result, name, drawing) for drawing in drawings)]
    return "\n".join(parts)


def _head(result: Result, name: str) -> str:
    machine, gpu = result.machine, result.machine["gpu"]
    kind = [f"{what} {machine[f'cpu_{what}']}" for what in ("vendor", "family", "model") if machine[f"cpu_{what}"]]
    on_gpu = "none"
    if gpu is not None:
        on_gpu = f"{gpu['name']}, capability {gpu['capability']}, {_size(gpu['memory'])}, driver {gpu['driver']}"
    timed = [entry for entry in result.entries if entry.seconds and entry.problem.subject != "machine"]
    rounds = [entry.seconds.rounds for entry in timed if entry.seconds]
    outputs = sorted({entry.output for entry in timed}) or ["fresh"]
    lines = {
        "Processor": ", ".join([machine["cpu"], *kind, f"{machine['cores']} cores"]),
        "Instruction sets": ", ".join(machine["instruction_sets"]) or "not known",
        "Last-level cache": _size(machine["last_level_cache"]),
        "Memory": _size(machine["memory"]),
        "GPU": on_gpu,
        "System": f"{machine['system']}, Python {machine['python']}",
        "Commit": _commit(result.commit),
        "Date": _date(result.date),
        "Versions": ", ".join(f"{package} {version}" for package, version in result.versions.items() if version),
        "Settings": ", ".join(f"{key} {value}" for key, value in result.settings.items()),
        "Made by": f"`{result.command}`, then `{_command(name)}`",
    }
    how = (
        f"Times are medians with quartiles over all rounds of all turns: {_range(rounds)} rounds.",
        f"Memory for a gradient is {' or '.join(outputs)} every time, as in training.",
        f"Inputs are rotated ({_range(entry.input_sets for entry in timed)} sets), so that they come from memory.",
        "Peak memory is the resident set beyond the inputs, one process per case; on a GPU, the allocator's peak.",
        "Floor: the bytes that must move over the read rate of the same run and threads; on a GPU, the copy rate.",
    )
    facts = "".join(f"- {what}: {value}\n" for what, value in lines.items())
    return f"# Benchmarks on {machine['name']}\n\n{facts}\nHow it was measured:\n\n" + "".join(f"- {x}\n" for x in how)


def _command(name: str) -> str:
    return f"python -m bench.report bench/results/{name}.json"


def _size(count: int | None) -> str:
    return "not known" if count is None else bytes_text(count)


def _commit(commit: Mapping[str, Any]) -> str:
    name = "not known" if commit["id"] is None else f"`{commit['id'][:12]}`"
    return f"{name} with uncommitted changes" if commit["dirty"] else name


def _date(date: str) -> str:
    return datetime.datetime.fromisoformat(date).astimezone(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _range(counts: Iterable[int]) -> str:
    distinct = sorted(set(counts))
    return " to ".join(str(count) for count in dict.fromkeys((distinct[0], distinct[-1]))) if distinct else "no"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def _rates(result: Result) -> str:
    places = dict.fromkeys((device, threads) for _, device, threads in result.rates)
    rows = [
        [device, str(threads or "-"), *(_rate(result.rates.get((kind, device, threads))) for kind in ("read", "copy"))]
        for device, threads in places
    ]
    table = _table(("device", "threads", "read, GB/s", "copy, GB/s"), rows)
    return "## Read and copy rates\n\n" + (table if rows else "Not measured, so that there are no floors.\n")


def _rate(entry: Entry | None) -> str:
    if entry is None:
        return "not measured"
    if entry.seconds is None or entry.traffic is None:
        return f"failed: {entry.failure}"
    times = (entry.seconds.median, entry.seconds.upper, entry.seconds.lower)
    return "{} [{}, {}]".format(*(number(entry.traffic / seconds / 1e9) for seconds in times))


def _repeatability(result: Result) -> str:
    title, previous = "## Repeatability\n\n", result.previous
    if previous is None or previous.settings != result.settings:
        return f"{title}There is no run before this one on this machine with the same settings.\n"
    moved, count = _moved(result, previous)
    text = (
        f"{title}{count - len(moved)} of {count} medians{f' ({1 - len(moved) / count:.0%})' if count else ''} differ "
        "by no more than the larger interquartile range of the two runs: "
        f"{_commit(previous.commit)}, {_date(previous.date)}, and {_commit(result.commit)}, {_date(result.date)}.\n"
    )
    if not moved:
        return text
    rows = []
    for change, entry, before in moved[:WORST]:
        assert entry.seconds is not None
        spread = max(entry.seconds.spread, before.spread) / before.median
        times = (seconds_text(before.median), seconds_text(entry.seconds.median), f"{change:+.0%}", f"{spread:.0%}")
        rows.append([entry.problem.subject, entry.contender, _problem_text(entry.problem), *times])
    headers = ("subject", "contender", "problem", "before", "now", "change", "larger interquartile range")
    return f"{text}\nThose that moved most:\n\n{_table(headers, rows)}"


def _moved(result: Result, previous: Previous) -> tuple[list[tuple[float, Entry, Seconds]], int]:
    """Medians beyond the larger interquartile range, the largest relative change first; how many both runs have."""
    moved, count = [], 0
    for entry in result.entries:
        now, before = entry.seconds, previous.seconds.get((entry.problem, entry.contender))
        if now is None or before is None:
            continue
        count += 1
        if abs(now.median - before.median) > max(now.spread, before.spread):
            moved.append((now.median / before.median - 1, entry, before))
    return sorted(moved, key=lambda each: -abs(each[0])), count


def _problem_text(problem: Problem) -> str:
    return ", ".join(f"{name} {value}" for name, value in _attributes(problem).items())


def _targets(result: Result) -> str:
    rows = []
    for target in load():
        found = judge(target, result)
        rows.append([target.name, target.wanted, found.measured, f"**{found.verdict}**"])
    return f"## Targets\n\n{_table(('what', 'wanted', 'measured', 'verdict'), rows)}"


READING = f"""## Results

Times are medians with quartiles in brackets; the fastest of ours is bold. "Against" a peer says how many times as fast
the fastest of ours is: a number below 1 is a loss and says so. "Over the floor" is its time over that floor. Errors are
the largest difference to float64 over the largest magnitude, of the value / of the gradient. † marks a spread
(interquartile range) above {WIDE:.0%} of the median.
"""


def _subject(result: Result, subject: str) -> str:
    problems = sorted((p for p in result.solved if p.subject == subject), key=_place)
    contenders = ordered(name for p in problems for name in result.solved[p])
    peers = [name for name in contenders if name not in OURS]
    columns, shared = _columns(problems)
    failures: list[str] = []
    times, others = [], []
    for p in problems:
        solved, best, floor = result.solved[p], result.best(p), result.floor(p)
        keys = [_attributes(p)[name] for name in columns]
        cells = [_time(solved.get(name), best, failures) for name in contenders]
        gains = [_gain(speedup(best, solved.get(name))) for name in peers]
        share = f"{number(best.seconds.median / floor)}x" if best and best.seconds and floor else "-"
        times.append([*keys, *cells, *gains, share])
        others.append([*keys, *(_memory_and_errors(solved.get(name)) for name in contenders)])
    time_headers = (*columns, *contenders, *(f"against {name}" for name in peers), "over the floor")
    reasons = "".join(f"\n({place}) {reason}\n" for place, reason in enumerate(failures, 1))
    return (
        f"### {subject}\n\nIn all rows: {shared}.\n\n{_table(time_headers, times)}{reasons}\n"
        f"Peak memory; errors:\n\n{_table((*columns, *contenders), others)}"
    )


def _place(problem: Problem) -> tuple[object, ...]:
    dtype, direction = list(ITEM_SIZES).index(problem.dtype), DIRECTIONS.index(problem.direction)
    return [count for _, count in problem.size], problem.device, dtype, direction, -(problem.threads or 0)


def _attributes(problem: Problem) -> dict[str, str]:
    size = {name.replace("_", " "): f"{count:,}" for name, count in problem.size}
    threads = {} if problem.threads is None else {"threads": str(problem.threads)}
    return {**size, "dtype": problem.dtype, "direction": problem.direction, "device": problem.device, **threads}


def _columns(problems: Sequence[Problem]) -> tuple[list[str], str]:
    """What tells the rows apart, the direction in any case, and in words what all share."""
    rows = [_attributes(problem) for problem in problems]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if name == "direction" or len({row.get(name) for row in rows}) > 1]
    return columns, ", ".join(f"{name} {rows[0][name]}" for name in names if name not in columns)


def _time(entry: Entry | None, best: Entry | None, failures: list[str]) -> str:
    """A cell; a failure's reason joins ``failures`` and is numbered."""
    if entry is None:
        return "not measured"
    if entry.seconds is None:
        reason = f"{entry.contender}: {entry.failure}"
        if reason not in failures:
            failures.append(reason)
        return f"failed ({failures.index(reason) + 1})"
    seconds = entry.seconds
    unit, _ = unit_of_time(seconds.median)
    median = f"**{seconds_text(seconds.median)}**" if entry is best else seconds_text(seconds.median)
    wide = "†" if seconds.spread > WIDE * seconds.median else ""
    return f"{median} [{number(seconds.lower / unit)}, {number(seconds.upper / unit)}]{wide}"


def _gain(gain: float | None) -> str:
    return "-" if gain is None else f"{number(gain)}x" if gain >= 1 else f"**{number(gain)}x, slower**"


def _memory_and_errors(entry: Entry | None) -> str:
    if entry is None or entry.failure is not None:
        return "-" if entry is None else "failed"
    errors = ["-" if error is None else f"{error:.1e}" for error in (entry.errors or {}).values()]
    return f"{'-' if entry.memory is None else bytes_text(entry.memory)}; {' / '.join(errors) or '-'}"


def _figure(result: Result, name: str, drawing: Drawing) -> str:
    if drawing.figure is None:
        return f"### {drawing.title}\n\nLeft out: {drawing.caption}.\n"
    made = f"Made by `{_command(name)}` from a run on {result.machine['name']}, {_date(result.date)}."
    return f"### {drawing.title}\n\n![{drawing.title}]({name}/{drawing.name}.svg)\n\n{drawing.caption} {made}\n"


def summarize(result: Result, console: Console) -> None:
    """Print the gist: the best of ours on each subject's largest problem, the targets and what failed."""
    table = Table(title=f"{result.machine['name']}, {_date(result.date)}", title_justify="left")
    for header in ("subject", "best of ours", "time", "against", "floor"):
        table.add_column(header, overflow="fold")
    for subject in dict.fromkeys(problem.subject for problem in result.solved):
        for dtype in ITEM_SIZES:
            directions = [d for d in ("both", "forward") if result.largest(subject, dtype, d)]
            problem = result.largest(subject, dtype, directions[0]) if directions else None
            if problem is not None:
                table.add_row(f"{subject}, {dtype}, {problem.direction}", *_gist(result, problem))
    console.print(table)
    verdicts = collections.Counter(judge(target, result).verdict for target in load())
    console.print("Targets: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()), markup=False)
    for entry in result.entries:
        if entry.failure is not None:
            where = f"{entry.problem.subject}, {entry.contender}, {_problem_text(entry.problem)}"
            console.print(f"FAILED {where}: {entry.failure}", style="bold red", markup=False)


def _gist(result: Result, problem: Problem) -> list[str]:
    solved, best, floor = result.solved[problem], result.best(problem), result.floor(problem)
    if best is None or best.seconds is None:
        return ["none", "-", "-", "-"]
    gains = [f"{name} {_gain(speedup(best, solved[name])).strip('*')}" for name in ordered(solved) if name not in OURS]
    share = f"{number(best.seconds.median / floor)}x" if floor else "-"
    return [best.contender, seconds_text(best.seconds.median), "; ".join(gains) or "-", share]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="the stored result, bench/results/<machine>.json")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the page goes; beside the result by default")
    options = parser.parse_args(arguments)
    name, folder = options.result.stem, options.output or options.result.parent
    try:
        result = read(options.result)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    text = page(result, name, draw(result, folder / name))
    (folder / f"{name}.md").write_text(text)
    console = Console()
    summarize(result, console)
    console.print(f"Wrote {folder / name}.md", markup=False)


if __name__ == "__main__":
    main()
