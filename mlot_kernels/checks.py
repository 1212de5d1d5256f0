"""Checks of what a user passes: each names the argument, what came, what was expected, and a way out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and outputs are kept in: float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def tensor(name: str, value: Any, shape: str, dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor:
    """``value`` itself, if it is a plain tensor of one of ``dtypes`` with as many dimensions as ``shape`` names.

    Args:
        shape: how messages write the shape, e.g. ``"[B, T, V]"``; several are joined by " or ". ``"[..., n]"`` has any
            number of dimensions, at least those that are named.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":  # its class lives in a module that is slow to import
        raise TypeError(
            f"{name} is a DTensor, which is not supported: its rows or columns may lie on other ranks; "
            "pass .to_local() where every rank holds whole rows, or .full_tensor()"
        )
    if value.dtype not in dtypes:
        way_out = "; call .float()" if dtypes is FLOATS else ""
        raise TypeError(f"{name} must be one of {', '.join(map(str, dtypes))}, got {value.dtype}{way_out}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {value.layout}; call .to_dense()")
    if shape.startswith("[..."):
        fits = value.dim() >= shape.count(",")
    else:
        fits = value.dim() in [option.count(",") + 1 if option != "[]" else 0 for option in shape.split(" or ")]
    if not fits:
        raise ValueError(f"{name} must be {shape}, got {tuple(value.shape)}")
    return value


def sized(name: str, value: Tensor, shape: Sequence[int], meaning: str) -> None:
    """``value`` has exactly this shape, which ``meaning`` explains, e.g. ``"[B, A] as its rows"``."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must be {meaning}, {tuple(shape)} here, got {tuple(value.shape)}")


def same_device(**tensors: Tensor | None) -> None:
    present = {name: value for name, value in tensors.items() if value is not None}
    if len({value.device for value in present.values()}) > 1:
        where = ", ".join(f"{name} on {value.device}" for name, value in present.items())
        raise ValueError(f"all tensors must be on one device, got {where}; move them with .to(device)")


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def integer(name: str, value: Any, least: int, most: int | None = None, what: str = "") -> Any:
    """``value``, an int (under torch.compile maybe a SymInt) in ``least..most``; ``what`` explains the upper end."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}{what and f' ({what})'}"
        raise ValueError(f"{name} must be at least {least}{upper}, got {value}")
    return value


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """``value`` as a finite float, within bounds."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Python number, got a tensor; pass .item()")
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    value = float(value)
    if not -math.inf < value < math.inf:  # torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be finite, got {value}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be above {above:g}, got {value:g}")
    if least is not None and not value >= least:
        raise ValueError(f"{name} must be at least {least:g}, got {value:g}")
    if below is not None and not value < below:
        raise ValueError(f"{name} must be below {below:g}, got {value:g}")
    if most is not None and not value <= most:
        raise ValueError(f"{name} must be at most {most:g}, got {value:g}")
    return value


def choice(name: str, value: Any, options: Sequence[str]) -> str:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value
