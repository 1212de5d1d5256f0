"""What a benchmark's file says: one problem, who solves it, and the sizes at which they are measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.targets import Target, load
from mlot_kernels.backends import BACKENDS
from mlot_kernels.registry import OPERATORS

Outputs = tuple[Tensor, ...]
Size = Mapping[str, int]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIRECTIONS = ("forward", "backward", "both")
PAIRS = ((50_304, 32_000), (50_257, 32_001), (128_256, 151_936), (262_144, 151_936))
"""Vocabularies of student and teacher: Pythia and Llama 2, GPT-2 and a Llama 2 with one token more, Llama 3 and Qwen,
Gemma and Qwen."""


@dataclass(frozen=True)
class Peer:
    """Another way to solve the problem.

    Attributes:
        call: takes the suite's inputs and returns what ``ours`` does.
        truth: what it should give, from inputs in float64, where that is not what ``ours`` gives.
        compiled: ``call`` is run under ``torch.compile``.
        needs: the package without which it cannot run.
        waits: something in it waits for the device, so that no CUDA graph can hold it.
        sorts: torch orders equal logits as it likes, and 16-bit rows are full of them: there only values are checked.
        inexact: how far its method leaves its values from the truth, relatively; its gradient is then not checked.
        only_full: left out of the quick suite, because it takes long to compile or to import.
    """

    call: Callable[..., Outputs]
    truth: Callable[..., Outputs] | None = None
    compiled: bool = False
    needs: str | None = None
    waits: bool = False
    sorts: bool = False
    inexact: float | None = None
    only_full: bool = False


@dataclass(frozen=True, eq=False)
class Suite:
    """One problem and who solves it. ``bench_<subject>.py`` holds it under the name ``SUITE``.

    Attributes:
        subject: the operator's or the loss's name.
        operators: the operators that ours is made of; it is measured on each backend that has all of them.
        inputs: ``(dtype, device, seed, **size) -> `` tensors; an operator's ``cases.large``.
        leaves: which of them ask for a gradient; none where the outputs have none.
        ours: ``(*inputs, backend) -> `` differentiable outputs.
        peers: name -> the others.
        traffic: ``(*inputs) -> `` the bytes that must move in forward and in backward, whoever solves the problem.
        logits: how many of the first inputs are logits.
        sizes: ``"quick"`` and ``"full"`` -> sizes on a CPU.
        gpu_sizes: the same on a GPU.
    """

    subject: str
    operators: tuple[str, ...]
    inputs: Callable[..., tuple[Tensor, ...]]
    leaves: tuple[int, ...]
    ours: Callable[..., Outputs]
    traffic: Callable[..., tuple[int, int]]
    sizes: Mapping[str, tuple[Size, ...]]
    gpu_sizes: Mapping[str, tuple[Size, ...]]
    peers: Mapping[str, Peer] = field(default_factory=dict)
    logits: int = 0

    @property
    def directions(self) -> tuple[str, ...]:
        """The last one is the call as users make it."""
        return DIRECTIONS if self.leaves else ("forward",)

    @property
    def backends(self) -> tuple[str, ...]:
        """Those that have every operator, and ``"auto"`` where others have some of them, so that users get a mixture.

        Whether one can run a call is seen when it does.
        """
        having = {name: sum(name in OPERATORS[op].forward for op in self.operators) for name in BACKENDS}
        whole = tuple(name for name in BACKENDS if having[name] == len(self.operators))
        mixed = any(0 < count < len(self.operators) for count in having.values())
        return (*whole, "auto") if mixed else whole


@dataclass(frozen=True)
class Measurement:
    """One entry of the results."""

    suite: Suite
    contender: str
    size: tuple[tuple[str, int], ...]
    dtype: torch.dtype
    direction: str
    device: str
    threads: int | None  # None on a GPU

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "subject": self.suite.subject,
            "contender": self.contender,
            "size": dict(self.size),
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": self.direction,
            "device": self.device,
            "threads": self.threads,
        }

    @property
    def peer(self) -> Peer | None:
        """None where the contender is ours."""
        return self.suite.peers.get(self.contender)

    @property
    def whole(self) -> bool:
        """The call as a user makes it, with all that it holds at a time."""
        return self.direction == self.suite.directions[-1] and self.threads != 1

    def traffic(self, *inputs: Tensor) -> int:
        """Bytes that must move in this direction."""
        forward, backward = self.suite.traffic(*inputs)
        return {"forward": forward, "backward": backward, "both": forward + backward}[self.direction]

    def __str__(self) -> str:
        parts = [self.contender, "x".join(str(n) for _, n in self.size), self.identity["dtype"], self.direction]
        return "-".join(parts + ([] if self.threads is None else [f"{self.threads}t"]))


def plan(suite: Suite, kind: str, device: str, cores: int) -> Iterator[Measurement]:
    """What to measure, contenders innermost, so that they meet the machine in the same mood.

    ``"quick"`` measures the first size in float32 in all directions, and both directions together in bfloat16 and on
    one thread; the other sizes in float32, both directions together. What takes long is measured less: compiled peers
    at the first size on two threads, the reference, which is not made to be fast, in both directions together on two.
    To these comes what ``targets.json`` asks for. ``"full"`` measures everything.
    """
    everything = list(_everything(suite, kind, device, cores))
    if kind == "full":
        yield from everything
        return
    first, usual = everything[0].size, suite.directions[-1]
    most = everything[-1].threads

    def in_quick(measurement: Measurement) -> bool:
        rare = (measurement.direction != usual) + (measurement.threads != most)
        return _in_quick(measurement, measurement.size == first, rare)

    yield from filter(in_quick, everything)
    targets = [target for target in load() if (target.subject, target.device) == (suite.subject, device)]
    for measurement in _everything(suite, "full", device, cores):
        taken = measurement in everything and in_quick(measurement)
        if not taken and any(_serves(measurement, target) for target in targets):
            yield measurement


def _everything(suite: Suite, kind: str, device: str, cores: int) -> Iterator[Measurement]:
    sizes = (suite.gpu_sizes if device == "cuda" else suite.sizes)[kind]
    threads: tuple[int | None, ...] = (None,) if device == "cuda" else tuple(sorted({1, min(2, cores)}))
    peers = (name for name, peer in suite.peers.items() if kind == "full" or not peer.only_full)
    contenders = (*suite.backends, *peers)
    for size, dtype, direction, n, contender in itertools.product(sizes, DTYPES, suite.directions, threads, contenders):
        yield Measurement(suite, contender, tuple(size.items()), dtype, direction, device, n)


def _serves(measurement: Measurement, target: Target) -> bool:
    """Whether ``target`` cannot be judged without this measurement."""
    identity = measurement.identity
    return (
        measurement.contender in (*target.contenders, target.against)
        and (identity["dtype"], measurement.direction) == (target.dtype, target.direction)
        and measurement.threads == target.threads
        and target.size.items() <= identity["size"].items()
    )


def _in_quick(measurement: Measurement, first_size: bool, rare: int) -> bool:
    """``rare`` counts what is not as users call it: one direction alone, fewer threads."""
    if measurement.dtype == torch.float16 or rare + (measurement.dtype == torch.bfloat16) > first_size:
        return False
    if measurement.contender == "reference":
        return rare == 0
    compiled = measurement.peer is not None and measurement.peer.compiled
    return not compiled or (first_size and measurement.threads != 1)


def sized(dimensions: tuple[str, ...], *values: tuple[int, ...]) -> tuple[Size, ...]:
    """``sized(("rows", "vocabulary"), (64, 50_304), ...)``."""
    return tuple(dict(zip(dimensions, each, strict=True)) for each in values)


_ONE_SIDE = ("sequences", "rows", "vocabulary")
_TWO_SIDES = ("sequences", "rows", "student_vocabulary", "teacher_vocabulary")
_VOCABULARIES = (50_304, 50_257, 128_256, 151_936, 262_144)

ONE_SIDE: Mapping[str, tuple[Size, ...]] = {
    "quick": sized(_ONE_SIDE, (2, 16, 50_304), (2, 16, 151_936)),
    "full": sized(_ONE_SIDE, *((2, 32, V) for V in _VOCABULARIES), (2, 128, 50_304)),
}
ONE_SIDE_GPU: Mapping[str, tuple[Size, ...]] = {
    "quick": sized(_ONE_SIDE, (8, 256, 151_936)),
    "full": sized(_ONE_SIDE, *((8, 256, V) for V in _VOCABULARIES), (8, 1024, 50_304)),
}
TWO_SIDES: Mapping[str, tuple[Size, ...]] = {
    "quick": sized(_TWO_SIDES, (2, 16, *PAIRS[0]), (2, 32, *PAIRS[0]), (2, 16, *PAIRS[2])),
    "full": sized(_TWO_SIDES, *((2, 32, *pair) for pair in PAIRS), (2, 64, *PAIRS[0]), (2, 128, *PAIRS[0])),
}
TWO_SIDES_GPU: Mapping[str, tuple[Size, ...]] = {
    "quick": sized(_TWO_SIDES, (8, 256, *PAIRS[0]), (8, 512, *PAIRS[0]), (8, 256, *PAIRS[2])),
    "full": sized(_TWO_SIDES, *((8, 256, *pair) for pair in PAIRS), (8, 512, *PAIRS[0]), (8, 1024, *PAIRS[0])),
}


def nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
