"""Which GPU kernels run without being named: those that were seen right, and no slower, on a GPU of the same kind.

``verified.json`` holds what ``make gpu-check`` saw, by architecture, operator and backend.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

NEEDED = ("triton", "cuda")  # the backends that must be verified; the others run anywhere as they run here
PATH = Path(__file__).with_name("verified.json")

Table = dict[str, dict[str, dict[str, dict[str, Any]]]]  # architecture -> operator -> backend -> what was seen

ARCHITECTURES: Table = json.loads(PATH.read_text())["architectures"]
_architectures: dict[int, str] = {}  # by the device's index

F = TypeVar("F", bound=Callable[..., Any])


def at_trace_time(function: F) -> F:
    """Let ``torch.compile`` call this function of constants while it traces, and keep what it returned.

    ``torch.compiler.assume_constant_result`` does the same, but imports the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@at_trace_time
def reason(operator: str, backend: str, device: torch.device) -> str | None:
    """Why ``auto`` passes over a backend on this device although it could run, in words; None where it does not."""
    if backend not in NEEDED or device.type != "cuda":
        return None
    where = architecture(device.index or 0)
    seen = ARCHITECTURES.get(where, {}).get(operator, {}).get(backend)
    if seen is None:
        words = f"not yet verified on {where}"
    elif not seen["passed"]:
        words = f"failed its checks on {where}"
    elif seen["faster_than_next"] is None:
        words = f"not yet measured on {where}"
    elif not seen["faster_than_next"]:
        words = f"slower than {seen['next']} on {where} when last measured"
    else:
        return None
    return f"{words}; set MLOT_BACKEND={backend} to use it"


def architecture(index: int) -> str:
    """The kind of GPU ``index``, such as ``sm_90``, or ``gfx942`` on ROCm."""
    if index not in _architectures:
        _architectures[index] = _ask(index)
    return _architectures[index]


def _ask(index: int) -> str:
    if not torch.cuda.is_available():
        return "a GPU that is not here"  # the tensor is fake
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
