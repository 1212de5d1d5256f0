"""Which implementation of an operator runs, and why.

A backend is a name: ``reference`` (plain torch, any device), ``cpu`` (C++), ``triton`` and ``cuda`` (GPU). ``resolve``
picks one before the operator is called, so that the operator itself sees the choice as an ordinary string argument and
``torch.compile`` has nothing to guess. Unless it is named, a GPU kernel runs only where it was verified (``verified``).

An implementation is a function of the operator's arguments; it may carry a function ``refuses`` of the same arguments
that says in words why it cannot run them, or None (see ``refusing``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mlot_kernels import verified

BACKENDS = ("reference", "cpu", "triton", "cuda")
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}

# Read once, at import, and plain globals: torch.compile can trace neither find_spec nor a ContextVar.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_CUDA_ON_HOST = "MLOT_CUDA_ON_HOST" in os.environ  # of the tests; see native.load_cuda
_environment: str | None = os.environ.get("MLOT_BACKEND") or None
_overrides: list[list[str]] = []  # one-element lists, so that each block finds its own; the last one holds
_explaining: int | None = None  # the thread that explains
_warned = False

_one_explains = threading.Lock()

F = TypeVar("F", bound=Callable[..., Any])


class BackendUnavailable(RuntimeError):
    """The backend that the caller named cannot run this call; the message says why and what can."""


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found. Printed, it is a table of the backends with the one that would run marked.

    Attributes:
        operator: its name.
        chosen: the backend that would run; None where the named one cannot run the call.
        refusals: for every backend why it cannot run this call; None where it can.
        passed_over: for backends that can, but that run here only if they are named, why; empty where one was named.
    """

    operator: str
    chosen: str | None
    refusals: Mapping[str, str | None]
    passed_over: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"mlot::{self.operator}"]
        for name, reason in self.refusals.items():
            said = reason or "can run this call"
            if name in self.passed_over:
                said += f"; not chosen: {self.passed_over[name]}"
            lines.append(f"  {'*' if name == self.chosen else ' '} {name:<10} {said}")
        return "\n".join(lines)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator in this block, in the whole process, on backend ``name``; never falls back.

    Raises:
        ValueError: there is no backend of that name.
    """
    mine = [_known(name, "use_backend's name")]
    _overrides.append(mine)
    try:
        yield
    finally:
        _overrides[:] = [other for other in _overrides if other is not mine]  # others may have come since


def explain(function: Callable[..., Any], *arguments: Any, **options: Any) -> Explanation:
    """Say which backend a call of an operator would use, and why each other one would not, without running it.

    Args:
        function: a public operator, e.g. ``mlot_kernels.rank_truncate``. Of a loss it explains the first operator.
        arguments, options: what it would be called with; they are checked as the call itself would check them.
    """
    global _explaining
    with _one_explains:
        _explaining = threading.get_ident()
        try:
            function(*arguments, **options)
        except _Explained as answer:
            return answer.explanation
        finally:
            _explaining = None
    raise TypeError(f"explain takes an operator of mlot_kernels, got {function!r}, which called none")


def refusing(implementation: F, refuses: Callable[..., str | None]) -> F:
    """``implementation`` with one more reason, in words, for calls that it cannot run."""
    already = getattr(implementation, "refuses", lambda *_: None)
    implementation.refuses = lambda *arguments: refuses(*arguments) or already(*arguments)  # type: ignore[attr-defined]
    return implementation


def resolve(
    operator: str,
    implementations: Mapping[str, Callable[..., Any]],
    arguments: Sequence[Any],
    backend: str | None = None,
) -> str:
    """Name the backend for a call of ``operator`` with ``arguments``.

    Strongest first: the ``backend`` argument, ``use_backend``, ``MLOT_BACKEND``, then the preference of the device of
    the first tensor, without the GPU kernels that are not verified on it.

    Raises:
        BackendUnavailable: a backend was named and cannot run this call.
        ValueError: there is no backend of that name.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    named = None
    if backend is not None:
        named = _known(backend, "backend")
    elif _overrides:
        named = _overrides[-1][0]
    elif _environment is not None:
        named = _known(_environment, "MLOT_BACKEND")

    if _explaining is not None and _explaining == threading.get_ident():
        raise _Explained(_explanation(operator, implementations, arguments, device, named))
    if named is not None:
        if reason := _refusal(named, implementations, arguments, device):
            usable = [name for name in implementations if not _refusal(name, implementations, arguments, device)]
            raise BackendUnavailable(f"{operator}: backend '{named}': {reason}; usable here: {', '.join(usable)}")
        return named
    passed_over = ""
    for name in PREFERENCE.get(device.type, ("reference",)):
        if _refusal(name, implementations, arguments, device):
            continue
        if reason := verified.reason(operator, name, device):
            passed_over += f"backend '{name}' could run this call: {reason}. "
            continue
        if name == "reference" and device.type == "cuda":
            _warn_of_reference(operator, passed_over or "no GPU backend can run this call. ")
        return name
    raise BackendUnavailable(f"{operator}: no backend can run this call on {device}")


class _Explained(Exception):
    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


def _explanation(
    operator: str,
    implementations: Mapping[str, Callable[..., Any]],
    arguments: Sequence[Any],
    device: torch.device,
    named: str | None,
) -> Explanation:
    refusals = {name: _refusal(name, implementations, arguments, device) for name in BACKENDS}
    usable = [name for name in BACKENDS if refusals[name] is None]
    if named is not None:
        return Explanation(operator, named if named in usable else None, refusals, {})
    reasons = {name: verified.reason(operator, name, device) for name in usable}
    passed_over = {name: reason for name, reason in reasons.items() if reason is not None}
    preferred = PREFERENCE.get(device.type, ("reference",))
    chosen = next((name for name in preferred if name in usable and name not in passed_over), None)
    return Explanation(operator, chosen, refusals, passed_over)


def _refusal(
    name: str, implementations: Mapping[str, Callable[..., Any]], arguments: Sequence[Any], device: torch.device
) -> str | None:
    """Why ``name`` cannot run this call; None where it can."""
    if name not in implementations:
        return f"not implemented for this operator (it has {', '.join(implementations)})"
    if name == "triton":
        if not _HAS_TRITON:
            return "triton is not installed; pip install 'mlot-kernels[triton]'"
        if device.type != "cuda" and not _INTERPRETED:
            return f"the tensors are on {device.type}, it needs cuda"
    if name in ("cpu", "cuda") and device.type != ("cpu" if _CUDA_ON_HOST else name):
        return f"the tensors are on {device.type}, it needs {name}"
    refuses = getattr(implementations[name], "refuses", None)
    return refuses(*arguments) if refuses is not None else None


def _known(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{what} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@verified.at_trace_time  # torch.compile cannot trace a warning
def _warn_of_reference(operator: str, why: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"mlot_kernels: {operator} runs on the plain torch reference, right but slow: {why}"
            "mlot_kernels.explain(...) says more; backend='reference' runs it without this warning.",
            stacklevel=4,
        )
