"""What memory gives on this machine: the yardstick of every other figure in the same run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mlot_kernels.info import collect

WORDS = {"cpu": 64 << 20, "cuda": 512 << 20}  # of float32: 256 MiB and 2 GiB, far beyond any cache


@dataclass(frozen=True)
class Rate:
    """Reading or copying a long array."""

    kind: str
    device: str
    threads: int | None

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "subject": "machine",
            "contender": self.kind,
            "size": {"words": WORDS[self.device]},
            "dtype": "float32",
            "direction": "forward",
            "device": self.device,
            "threads": self.threads,
        }

    @property
    def traffic(self) -> int:
        """Bytes read and written."""
        return (2 if self.kind == "copy" else 1) * 4 * WORDS[self.device]

    def run(self) -> Callable[[], Any]:
        source = torch.ones(WORDS[self.device], device=self.device)
        if self.kind == "read":
            return source.sum
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def __str__(self) -> str:
        return self.kind if self.threads is None else f"{self.kind}-{self.threads}t"


@functools.cache  # collecting looks at the whole installation
def cache_size(device: str) -> int:
    """Bytes of the last cache before memory; 32 MiB where the system does not tell."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    return collect()["machine"]["last_level_cache"] or 32 << 20


def plan(device: str, cores: int) -> Iterator[Rate]:
    for threads in (None,) if device == "cuda" else sorted({1, min(2, cores)}):
        for kind in ("read", "copy"):
            yield Rate(kind, device, threads)
