"""What a benchmark's result holds, and the targets that it is judged by.

A ``Result`` knows the rates of its machine, the floors that follow from them and who solved which problem. ``load``
reads ``targets.json``; ``judge`` holds a target against a result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

DIRECTIONS = ("forward", "backward", "both")
ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}  # bytes, in the order of a page
OURS = ("cpu", "triton", "cuda", "auto", "reference")
PEERS = ("eager", "torch.compile", "torch.topk", "torch.cdist", "torch.sort", "published")
SUBJECTS = ("rank_truncate", "sorted_l1", "topk_softmax", "sinkhorn", "pairwise_cost", "multi_level_ot")
ROWS = ("sequences", "rows", "vocabulary", "student_vocabulary", "teacher_vocabulary")
SIZES = (*ROWS, "problems", "student_rows", "teacher_rows", "width")
TARGETS = Path(__file__).with_name("targets.json")
MEASURES = ("floor", "speedup", "seconds", "memory_over_gradient")
CPU = ("cpu", "cpu_vendor", "cpu_family", "cpu_model", "cores", "instruction_sets", "last_level_cache")
MACHINE = ("name", *CPU, "memory", "gpu", "system", "python")
GPU = ("name", "capability", "memory", "driver")


def number(value: float) -> str:
    """Three significant digits, never with an exponent."""
    if value <= 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


@dataclass(frozen=True)
class Seconds:
    """The median time and its quartiles over all turns, in seconds."""

    median: float
    lower: float
    upper: float
    rounds: int

    @property
    def spread(self) -> float:
        return self.upper - self.lower


@dataclass(frozen=True)
class Problem:
    """What is timed, whoever solves it."""

    subject: str
    size: tuple[tuple[str, int], ...]
    dtype: str
    direction: str
    device: str
    threads: int | None  # None on a GPU


@dataclass(frozen=True)
class Entry:
    """One problem solved by one contender; fields as in the stored format."""

    problem: Problem
    contender: str
    output: str
    input_sets: int
    seconds: Seconds | None  # None where it failed: a wrong result has no time
    traffic: int | None
    logits: int | None
    memory: int | None
    errors: Mapping[str, float | None] | None
    failure: str | None

    @property
    def ours(self) -> bool:
        return self.contender in OURS


@dataclass(frozen=True)
class Previous:
    """The run before on the same machine."""

    commit: Mapping[str, Any]
    date: str
    settings: Mapping[str, Any]
    seconds: Mapping[tuple[Problem, str], Seconds]


@dataclass(frozen=True)
class Result:
    """A stored result; ``solved`` holds the entries of each problem by contender, without the machine's rates."""

    machine: Mapping[str, Any]
    commit: Mapping[str, Any]
    date: str
    versions: Mapping[str, str | None]
    settings: Mapping[str, Any]
    command: str
    previous: Previous | None
    rates: Mapping[tuple[str, str, int | None], Entry]  # by kind, device and threads
    solved: Mapping[Problem, Mapping[str, Entry]]

    def rate(self, kind: str, device: str, threads: int | None) -> float | None:
        """Bytes per second that were ``"read"`` or copied (``"copy"``); None where that was not measured."""
        entry = self.rates.get((kind, device, threads))
        return entry.traffic / entry.seconds.median if entry and entry.traffic and entry.seconds else None

    def traffic(self, problem: Problem) -> int | None:
        """Bytes that must move, whoever solves it; None where no entry says."""
        return next((entry.traffic for entry in self.solved[problem].values() if entry.traffic), None)

    def floor(self, problem: Problem) -> float | None:
        """Seconds that moving the problem's bytes takes at the measured rate; None where either is not known."""
        rate = self.rate("copy" if problem.device == "cuda" else "read", problem.device, problem.threads)
        traffic = self.traffic(problem)
        return traffic / rate if traffic and rate else None

    @property
    def entries(self) -> list[Entry]:
        """All, the machine's rates first."""
        return [*self.rates.values(), *(entry for solved in self.solved.values() for entry in solved.values())]

    def largest(self, subject: str, dtype: str, direction: str) -> Problem | None:
        """The problem that stands for its subject: of the size with most dtypes and directions, so that the figures of
        one subject are of one size wherever they can, then most bytes, then most threads; on the run's device.
        """
        of_subject = [p for p in self.solved if p.subject == subject and p.device == self.settings["device"]]

        def extent(problem: Problem) -> tuple[int, int, int]:
            kinds = {(p.dtype, p.direction) for p in of_subject if p.size == problem.size}
            return len(kinds), self.traffic(problem) or 0, problem.threads or 0

        alike = [p for p in of_subject if (p.dtype, p.direction) == (dtype, direction)]
        return max(alike, key=extent, default=None)

    def best(self, problem: Problem) -> Entry | None:
        """The fastest of our backends whose result is right."""
        return fastest([entry for entry in self.solved[problem].values() if entry.ours])


def fastest(entries: Sequence[Entry]) -> Entry | None:
    """The entry with the smallest median among those that have a time; None where none has."""
    timed = [(entry.seconds.median, place) for place, entry in enumerate(entries) if entry.seconds]
    return entries[min(timed)[1]] if timed else None


def speedup(ours: Entry | None, peer: Entry | None) -> float | None:
    """How many times as fast as ``peer`` ``ours`` is; below 1 it is slower. None where either has no time."""
    if ours is None or peer is None or ours.seconds is None or peer.seconds is None:
        return None
    return peer.seconds.median / ours.seconds.median


def one_of(what: str, value: object, known: Iterable[str]) -> None:
    """Raise a ValueError unless ``value``, which is ``what``, is ``known``."""
    if value not in (known := tuple(known)):
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True)
class Target:
    """A figure that the package must reach.

    Attributes:
        name: what it is, in words.
        subject, direction, dtype, device, threads: the problem; threads is None on a GPU.
        size: the sizes that must agree; a problem may have others.
        contenders: our backends that count, the fastest of them.
        measure: ``"floor"`` (time over the time that the bytes take), ``"speedup"`` (over the peer ``against``),
            ``"seconds"`` or ``"memory_over_gradient"`` (peak memory beyond the inputs over the gradient's size).
        at_most, at_least: the bound: ``at_least`` for a speed-up, else ``at_most``.
        machine: for seconds, what the result's machine must be, or the times do not compare.
    """

    name: str
    subject: str
    direction: str
    dtype: str
    size: Mapping[str, int]
    device: str
    threads: int | None
    contenders: Sequence[str]
    measure: str
    against: str | None = None
    at_most: float | None = None
    at_least: float | None = None
    machine: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        here = f"target {self.name!r}:"
        machine = self.machine or {}
        for what, values, known in (
            ("subject", [self.subject], SUBJECTS),
            ("direction", [self.direction], DIRECTIONS),
            ("dtype", [self.dtype], ITEM_SIZES),
            ("device", [self.device], ("cpu", "cuda")),
            ("measure", [self.measure], MEASURES),
            ("size's key", self.size, SIZES),
            ("contender", self.contenders, OURS),
            ("against", [self.against] if self.measure == "speedup" else [], PEERS),
            ("machine's key", machine, MACHINE),
            ("machine's gpu's key", machine.get("gpu") or {}, GPU),
        ):
            for value in values:
                one_of(f"{here} {what}", value, known)
        speed, timed = self.measure == "speedup", self.measure == "seconds"
        if not self.contenders:
            raise ValueError(f"{here} contenders must name a backend, got none")
        if (self.threads is None) != (self.device == "cuda"):
            raise ValueError(f"{here} threads must be a number on cpu and null on cuda, got {self.threads}")
        if (self.at_least is not None, self.at_most is not None) != (speed, not speed):
            raise ValueError(f"{here} a speedup takes at_least alone, another measure at_most alone")
        if (self.against is not None) != speed:
            raise ValueError(f"{here} against goes with a speedup alone, got {self.against!r} with {self.measure}")
        if bool(machine) != timed:
            raise ValueError(f"{here} machine goes with seconds, and must then be there; got {self.machine}")

    @property
    def wanted(self) -> str:
        bound = self.at_least if self.at_least is not None else self.at_most
        return f"at {'most' if self.at_least is None else 'least'} {self.text(bound or 0, '{:g}'.format)}"

    def text(self, value: float, digits: Callable[[float], str] = number) -> str:
        if self.measure == "seconds":
            return seconds_text(value)
        of = {"floor": "the floor", "speedup": f"as fast as {self.against}", "memory_over_gradient": "the gradient"}
        return f"{digits(value)}x {of[self.measure]}"

    def reached(self, value: float) -> bool:
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0)


@dataclass(frozen=True)
class Verdict:
    """What was measured, in words, and "reached", "missed", "not measured" or "not comparable"."""

    measured: str
    verdict: str


def load(path: Path = TARGETS) -> list[Target]:
    """Read the targets.

    Raises:
        ValueError: a key or a name in a target is none that there is.
    """
    known = [field.name for field in fields(Target)]
    needed = [field.name for field in fields(Target) if field.default is MISSING]
    targets = []
    for place, stored in enumerate(json.loads(path.read_text())):
        where = f"{path.name}[{place}]"
        for key in stored:
            one_of(f"{where}: key", key, known)
        missing = [key for key in needed if key not in stored]
        if missing:
            raise ValueError(f"{where}: no key {', '.join(missing)}; a target needs {', '.join(needed)}")
        targets.append(Target(**stored))
    return targets


def judge(target: Target, result: Result) -> Verdict:
    """Hold ``target`` against ``result``: the fastest backend that counts, at the worst of the sizes that match.

    A time from another machine is not comparable. A wrong result misses its target.
    """
    problems, missing = _matching(target, result)
    if missing:
        return Verdict(missing, "not measured")
    values: list[tuple[float, str]] = []
    lacks: list[str] = []
    for problem in problems:
        candidates = [entry for name, entry in result.solved[problem].items() if name in target.contenders]
        entry = fastest(candidates)
        if entry is None:
            return Verdict(f"failed: {candidates[0].failure}", "missed")
        value = _MEASURES[target.measure](target, entry, result)
        if isinstance(value, str):
            lacks.append(value)
        else:
            values.append((value, entry.contender))
    if not values:
        return Verdict(lacks[0], "not measured")
    value, contender = min(values) if target.at_least is not None else max(values)
    among = f", worst of {len(values)} sizes" if len(values) > 1 else ""
    measured = f"{target.text(value)} ({contender}{among})"
    if target.machine is not None and not _covers(target.machine, result.machine):
        return Verdict(f"{measured}, on another machine", "not comparable")
    return Verdict(measured, "reached" if target.reached(value) else "missed")


def _matching(target: Target, result: Result) -> tuple[list[Problem], str | None]:
    """The problems that ``target`` is about and a backend that counts was run on, or what is missing."""
    backends = set(target.contenders)
    size = ", ".join(f"{key} {count}" for key, count in target.size.items())
    steps: list[tuple[str, Callable[[Problem], bool]]] = [
        (f"on device {target.device}", lambda problem: problem.device == target.device),
        (f"of {target.subject}", lambda problem: problem.subject == target.subject),
        (f"with {size}", lambda problem: _covers(target.size, dict(problem.size))),
        (f"in {target.dtype}", lambda problem: problem.dtype == target.dtype),
        (f"of direction {target.direction}", lambda problem: problem.direction == target.direction),
        (f"with threads {target.threads}", lambda problem: problem.threads == target.threads),
        (
            f"of backend {' or '.join(target.contenders)}",
            lambda problem: not backends.isdisjoint(result.solved[problem]),
        ),
    ]
    problems = list(result.solved)
    for what, keep in steps:
        problems = [problem for problem in problems if keep(problem)]
        if not problems:
            return [], f"no result {what}"
    return problems, None


def _covers(wanted: Mapping[str, Any], got: Mapping[str, Any] | None) -> bool:
    """Whether all that ``wanted`` names is in ``got``, at every depth."""
    if got is None:
        return False
    return all(
        _covers(value, got.get(key)) if isinstance(value, Mapping) else got.get(key) == value
        for key, value in wanted.items()
    )


def _over_floor(target: Target, entry: Entry, result: Result) -> float | str:
    floor = result.floor(entry.problem)
    if floor is None:
        return f"no floor: the bytes that must move, or the rate at threads {target.threads}, are missing"
    assert entry.seconds is not None
    return entry.seconds.median / floor


def _over_peer(target: Target, entry: Entry, result: Result) -> float | str:
    peer = result.solved[entry.problem].get(target.against or "")
    if peer is None:
        return f"no result of peer {target.against}"
    return speedup(entry, peer) or f"peer {target.against} failed: {peer.failure}"


def _time(target: Target, entry: Entry, result: Result) -> float | str:
    assert entry.seconds is not None
    return entry.seconds.median


def _over_gradient(target: Target, entry: Entry, result: Result) -> float | str:
    if entry.memory is None:
        return "no peak memory in the result"
    size = dict(entry.problem.size)
    vocabulary = size.get("student_vocabulary", size.get("vocabulary"))
    if vocabulary is None:
        return "no vocabulary in the size"
    elements = size.get("sequences", 1) * size.get("rows", 1) * vocabulary
    return entry.memory / (elements * ITEM_SIZES[entry.problem.dtype])


_MEASURES = dict(zip(MEASURES, (_over_floor, _over_peer, _time, _over_gradient), strict=True))


def unit_of_time(value: float) -> tuple[float, str]:
    """The unit in which ``value`` seconds reads best, as its seconds and its name."""
    return next(((unit, name) for unit, name in ((1.0, "s"), (1e-3, "ms")) if value >= unit), (1e-6, "us"))


def seconds_text(value: float, style: str = "") -> str:
    """In us, ms or s; to three digits unless ``style`` is another format."""
    unit, name = unit_of_time(value * (1 + 1e-9))  # 1 ms, not 1000 us, whatever the rounding
    return f"{format(value / unit, style) if style else number(value / unit)} {name}"


def bytes_text(count: float, style: str = "") -> str:
    """In KiB, MiB or GiB where it is as many; to three digits unless ``style`` is another format."""
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if count >= u), (1, "B"))
    return f"{format(count / unit, style) if style else number(count / unit)} {name}"
