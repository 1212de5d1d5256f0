"""Loads the C++ libraries, and makes their operators implementations of a backend."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mlot_kernels.backends import BackendUnavailable, refusing

FOLDER = Path(__file__).parent
OLDEST_TORCH = (2, 10)  # as csrc/mlot_toolchain.py has it
NEEDS = {  # what building a library needs, and the switch that insists on it
    "cpu": ("g++, ninja and torch", "MLOT_NATIVE"),
    "cuda": ("nvcc, g++, ninja and torch", "MLOT_CUDA"),
}


def load(library: str, folder: Path = FOLDER) -> str | None:
    """Load ``_<library>.so``, whose operators are ``torch.ops.mlot_<library>``.

    Returns:
        None where it loaded, else why it cannot be used, in words.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}; install a newer one"
    path = folder / f"_{library}.so"
    if not path.exists():
        why, what, switch = _why_it_was_not_built(library, folder), *NEEDS[library]
        return (
            f"this installation has no native library: {why}; "
            f"with {what} in place, install mlot-kernels again with {switch}=1"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = f"{path.name} did not load ({error}); install mlot-kernels again beside this torch"
        warnings.warn(f"mlot_kernels: {reason}. Until then plain torch runs in its place.", stacklevel=2)
        return reason
    return None


def _facts(folder: Path) -> dict[str, Any]:
    """What the build wrote of itself; nothing where there was none."""
    path = folder / "_build.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _why_it_was_not_built(library: str, folder: Path) -> str:
    facts = _facts(folder)
    if not facts:
        return "it was never built"
    return str(facts.get("missing") or facts.get(f"missing_{library}") or "it was removed after the build")


def load_cuda(folder: Path = FOLDER) -> str | None:
    """Load ``_cuda.so`` where torch has CUDA; elsewhere it is not touched. Returns what ``load`` does.

    For tests ``MLOT_CUDA_ON_HOST`` names a folder whose ``_cuda.so`` runs the kernels' threads on the CPU.
    """
    if on_host := os.environ.get("MLOT_CUDA_ON_HOST"):
        return load("cuda", Path(on_host))
    if torch.version.cuda is None:
        return "this torch has no CUDA; install one that has, and mlot-kernels again beside it"
    return too_new_for_the_driver(_facts(folder).get("cuda"), driver()) or load("cuda", folder)


def driver(library: str = "libcuda.so.1") -> int:
    """The newest CUDA version that this machine's driver knows, as CUDA counts: 12080 for 12.8. 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version))  # asks no GPU for anything
    except OSError:
        return 0
    return version.value


def too_new_for_the_driver(built: str | None, driver: int) -> str | None:
    """Why kernels ``built`` with a CUDA version cannot run on a driver that knows up to ``driver``; None if they can.

    ``driver`` is as CUDA counts, 12080 for 12.8; 0 where there is no driver, and hence no GPU to refuse.
    """
    if built is None or driver == 0 or int(built.split(".")[0]) <= driver // 1000:
        return None
    knows = f"{driver // 1000}.{driver % 1000 // 10}"
    return (
        f"it was built with CUDA {built}, and this machine's driver knows up to CUDA {knows}; update the driver, or "
        f"install the wheel for CUDA {knows} or older"
    )


MISSING = {"cpu": load("cpu"), "cuda": load_cuda()}  # library -> why it cannot be used; None where it can


def native(library: str, name: str) -> Callable[..., Any]:
    """The C++ operator ``torch.ops.mlot_<library>.<name>`` as a backend's implementation.

    Where the library is missing, it refuses every call with the reason.
    """

    @functools.cache
    def operator() -> Callable[..., Any]:
        return getattr(getattr(torch.ops, f"mlot_{library}"), name).default

    def call(*arguments: Any) -> Any:
        return operator()(*arguments)

    def unavailable(*_: Any) -> Any:
        raise BackendUnavailable(f"{name}: backend '{library}': {missing}")

    missing = MISSING[library]
    return call if missing is None else refusing(unavailable, lambda *_: missing)
