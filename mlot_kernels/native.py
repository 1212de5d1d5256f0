"""Loads the C++ libraries, and makes their operators implementations of a backend."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mlot_kernels.backends import refusing

FOLDER = Path(__file__).parent


def load(library: str, folder: Path = FOLDER) -> str | None:
    """Load ``_<library>.so``, whose operators are ``torch.ops.mlot_<library>``.

    Returns:
        None where it loaded, else why it cannot be used, in words.
    """
    path = folder / f"_{library}.so"
    if not path.exists():
        return (
            f"this installation has no native library: {_why_it_was_not_built(folder)}; "
            "with g++, ninja and torch in place, install mlot-kernels again with MLOT_NATIVE=1"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = f"{path.name} did not load ({error}); install mlot-kernels again beside this torch"
        warnings.warn(f"mlot_kernels: {reason}. Until then plain torch runs in its place.", stacklevel=2)
        return reason
    return None


def _why_it_was_not_built(folder: Path) -> str:
    facts = folder / "_build.json"
    if not facts.exists():
        return "it was never built"
    return str(json.loads(facts.read_text()).get("missing") or "it was removed after the build")


MISSING = {"cpu": load("cpu")}  # library -> why it cannot be used; None where it can


def native(library: str, name: str) -> Callable[..., Any]:
    """The C++ operator ``torch.ops.mlot_<library>.<name>`` as a backend's implementation.

    Where the library is missing, it refuses every call with the reason.
    """

    @functools.cache
    def operator() -> Callable[..., Any]:
        return getattr(getattr(torch.ops, f"mlot_{library}"), name).default

    def call(*arguments: Any) -> Any:
        return operator()(*arguments)

    missing = MISSING[library]
    return call if missing is None else refusing(call, lambda *_: missing)
