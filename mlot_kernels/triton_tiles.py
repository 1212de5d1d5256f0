"""Tile sizes and warps of every Triton kernel, by architecture: ``triton_tiles.json``, and how launches ask for them.

A kernel is ``<module or operator>.<function>``. Its launch options are those of the device's architecture where
``python -m mlot_kernels tune`` has found some, else its default. They depend on nothing else, above all not on the
batch: a tile's size decides in which order a row is summed up, so that results are equal to the bit for one
architecture and one table, and a sequence's do not depend on its batch mates. What must be the same on every
architecture, such as how many rows a partial sum covers, is no launch option and stands in its kernel's module.

A new kernel or option is entered in the file, under ``kernels``: its default, and the candidates that ``tune`` tries.
Names in capitals are the kernel's own constants, of which one may be taken down to what a call needs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mlot_kernels import verified

PATH = Path(__file__).with_name("triton_tiles.json")
ARCHITECTURE = re.compile(r"sm_\d+|gfx[0-9a-f]+")
LAUNCH_OPTIONS = ("num_warps", "num_stages")
MOST_WARPS = 32
STATED = {"enable_fp_fusion": True}  # in every launch: Triton's default changes in 3.10

Options = Mapping[str, int]


@dataclass(frozen=True)
class Kernel:
    """What a kernel is launched with where its architecture has no entry, and what else is worth a try."""

    default: Options
    candidates: tuple[Options, ...]


@dataclass(frozen=True)
class Table:
    """Kernels by name, and what each architecture has found to be faster than their defaults."""

    kernels: Mapping[str, Kernel]
    architectures: Mapping[str, Mapping[str, Options]]  # architecture -> kernel -> options

    def options(self, kernel: str, architecture: str | None = None) -> Options:
        """Those of the architecture, else the default.

        Raises:
            KeyError: there is no such kernel.
        """
        if kernel not in self.kernels:
            raise KeyError(f"{PATH.name} has no kernel {kernel!r}; it has {', '.join(self.kernels)}")
        return self.architectures.get(architecture or "", {}).get(kernel, self.kernels[kernel].default)


def parse(document: Any) -> Table:
    """The table that a JSON document of ``PATH``'s form holds.

    Raises:
        ValueError: it is malformed; the message names the entry, what is there and what was expected.
    """
    _expect(isinstance(document, dict) and document.get("format") == 1, "the file", "is not of format 1")
    parts = [document.get("kernels"), document.get("architectures")]
    _expect(all(isinstance(part, dict) for part in parts), "the file", "must have objects kernels and architectures")
    kernels = {name: _kernel(name, entry) for name, entry in parts[0].items()}
    architectures: dict[str, Mapping[str, Options]] = {}
    for architecture, entries in parts[1].items():
        known = ARCHITECTURE.fullmatch(architecture) is not None and isinstance(entries, dict)
        _expect(known, architecture, "must be an architecture such as sm_90 or gfx942, with an object of kernels")
        architectures[architecture] = {name: _entry(architecture, name, x, kernels) for name, x in entries.items()}
    return Table(kernels, architectures)


def _kernel(name: str, entry: Any) -> Kernel:
    fields = isinstance(entry, dict) and entry.keys() == {"default", "candidates"}
    _expect(fields and isinstance(entry["candidates"], list), name, "must have a default and a list of candidates")
    default = _options(f"{name}, default", entry["default"])
    candidates = tuple(_options(f"{name}, candidate {i}", x) for i, x in enumerate(entry["candidates"]))
    for i, candidate in enumerate(candidates):
        same = candidate.keys() == default.keys()
        _expect(same, f"{name}, candidate {i}", f"must have {_words(default)}, got {_words(candidate)}")
    return Kernel(default, candidates)


def _options(where: str, options: Any) -> Options:
    _expect(isinstance(options, dict) and "num_warps" in options, where, f"must have num_warps, got {options!r}")
    for name, value in options.items():
        known = name in LAUNCH_OPTIONS or name.isupper()
        _expect(known, where, f"has an option {name!r}; there are {', '.join(LAUNCH_OPTIONS)} and a kernel's constants")
        _expect(type(value) is int and value > 0, where, f"{name} must be a positive integer, got {value!r}")
        power = name == "num_stages" or value & (value - 1) == 0
        _expect(power, where, f"{name} must be a power of two, got {value}")
    warps = options["num_warps"]
    _expect(warps <= MOST_WARPS, where, f"num_warps must be at most {MOST_WARPS}, got {warps}")
    return MappingProxyType(options)


def _entry(architecture: str, name: str, entry: Any, kernels: Mapping[str, Kernel]) -> Options:
    where = f"{architecture}, {name}"
    _expect(name in kernels, where, f"there is no such kernel; there are {', '.join(kernels)}")
    _expect(isinstance(entry, dict) and "options" in entry, where, f"must have options, got {entry!r}")
    options = _options(where, entry["options"])
    listed = options in kernels[name].candidates or options == kernels[name].default
    _expect(listed, where, f"{dict(options)} are not among the kernel's candidates; tune again, or add them there")
    return options


def _words(options: Options) -> str:
    return ", ".join(options)


def _expect(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise ValueError(f"{PATH.name}: {where}: {what}")


TABLE = parse(json.loads(PATH.read_text()))

# Of the whole process, since autograd runs backward in a thread of its own: entries, and the kernels launched so far.
_override: tuple[Mapping[str, Options], set[str]] | None = None


def launch_options(kernel: str, device: torch.device) -> Mapping[str, Any]:
    """What ``kernel`` is launched with on ``device``: ``kernel[grid](..., **launch_options(...))``.

    Raises:
        KeyError: there is no such kernel.
    """
    if _override is not None:
        entries, launched = _override
        launched.add(kernel)
        return {**TABLE.options(kernel), **entries.get(kernel, {}), **STATED}
    return _of_architecture(kernel, verified.architecture(device.index or 0) if device.type == "cuda" else None)


@functools.cache
def _of_architecture(kernel: str, architecture: str | None) -> Mapping[str, Any]:
    return MappingProxyType({**TABLE.options(kernel, architecture), **STATED})


@contextlib.contextmanager
def overriding(entries: Mapping[str, Options] | None = None) -> Iterator[set[str]]:
    """Launch with ``entries``, and for other kernels with the defaults, whatever the device; for tuning and tests.

    It holds in the whole process. Yields the names of the kernels that have been launched in the block so far.
    """
    global _override
    before = _override
    launched: set[str] = set()
    _override = entries or {}, launched
    try:
        yield launched
    finally:
        _override = before
