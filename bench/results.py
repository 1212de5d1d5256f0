"""What a run of the benchmarks leaves: ``bench/results/<machine>.json``.

    {"format", "machine", "commit", "date", "versions", "settings", "command", "results": [entry], "previous"}

An entry is one measurement: its identity (subject, contender, size, dtype, direction, device, threads), whether the
contender is ours, its seconds (median, quartiles and rounds over all turns), traffic (bytes that must move), logits
(bytes of the logits among the inputs), memory (bytes at peak beyond the inputs), errors against float64 and, in place
of its seconds, why it failed. ``previous`` holds the identities and seconds of the run before on this machine.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.check import Errors
from mlot_kernels.info import collect

FORMAT = 1
IDENTITY = ("subject", "contender", "size", "dtype", "direction", "device", "threads")
PACKAGES = ("mlot-kernels", "torch", "triton", "numpy", "POT", "geomloss", "trl")


@dataclass
class Collected:
    """Entries by identity, in the order of the first turn."""

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)

    def add(
        self,
        identity: dict[str, Any],
        seconds: list[float],
        *,
        ours: bool,
        input_sets: int,
        traffic: int | None = None,
        logits: int | None = None,
        errors: Errors | None = None,
    ) -> None:
        """One turn's rounds."""
        key = _key(identity)
        self.times.setdefault(key, []).extend(seconds)
        self.entries.setdefault(
            key,
            {
                **identity,
                "ours": ours,
                "output": "fresh",
                "input_sets": input_sets,
                "traffic": traffic,
                "logits": logits,
                "memory": None,
                "errors": None if errors is None else asdict(errors),
                "failure": None,
            },
        )

    def remember(self, identity: dict[str, Any], memory: int) -> None:
        self.entries[_key(identity)]["memory"] = memory

    def fail(self, identity: dict[str, Any], reason: str) -> None:
        """A failed entry has no time, whatever other turns say."""
        entry = {**identity, "ours": None, "output": "fresh", "input_sets": 1}
        entry |= dict.fromkeys(("traffic", "logits", "memory", "errors"))
        self.entries.setdefault(_key(identity), entry)["failure"] = reason

    def finished(self) -> list[dict[str, Any]]:
        return [
            {**entry, "seconds": None if entry["failure"] else _summary(self.times[key])}
            for key, entry in self.entries.items()
        ]


def write(path: Path, collected: Collected, settings: dict[str, Any]) -> None:
    """Write a run's results; the ones that lay there become ``previous``."""
    found = collect()
    document = {
        "format": FORMAT,
        "machine": found["machine"],
        "commit": found["commit"],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in PACKAGES},
        "settings": settings,
        "command": "make bench" if settings["suite"] == "quick" else "make bench-full",
        "results": collected.finished(),
        "previous": _previous(path),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _previous(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    document = json.loads(path.read_text())
    kept = [{name: entry[name] for name in (*IDENTITY, "seconds")} for entry in document["results"]]
    return {name: document[name] for name in ("commit", "date", "settings")} | {"results": kept}


def _key(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)


def _summary(seconds: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(seconds if len(seconds) > 1 else seconds * 2, n=4, method="inclusive")
    return {"median": median, "lower": lower, "upper": upper, "rounds": len(seconds)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
