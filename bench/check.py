"""The reference check: a wrong result has no time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.measure import contender, inputs
from bench.suite import Measurement, Outputs
from mlot_kernels.parity import upstream_of

# What is wrong is off by more than this. How well a backend rounds is judged by tests/contract.py.
VALUE_TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Errors:
    """The largest difference to the definition in float64, over the largest magnitude."""

    value: float
    gradient: float | None


class CheckFailed(Exception):
    """The result is wrong, so that its time means nothing."""


def check(measurement: Measurement) -> Errors:
    """Judge a contender's outputs and gradients; once for all directions, threads and turns.

    Raises:
        CheckFailed: an output or a gradient is wrong.
    """
    verdict = _verdict(replace(measurement, direction="both", threads=None))
    if isinstance(verdict, str):
        raise CheckFailed(f"the reference check failed: {verdict}")
    return verdict


@functools.cache
def _verdict(measurement: Measurement) -> Errors | str:
    suite = measurement.suite
    outputs, gradients = _results(contender(measurement), inputs(measurement, 0), suite.leaves)
    peer = measurement.peer
    truth = peer.truth if peer is not None and peer.truth is not None else None
    true_outputs, true_gradients = _truth(replace(measurement, contender="reference"), truth)
    try:
        inexact = peer.inexact if peer is not None else None
        value = _compared("output", outputs, true_outputs, inexact or VALUE_TOLERANCE)
        free = peer is not None and peer.sorts and measurement.dtype.itemsize == 2
        if not suite.leaves or free or inexact is not None:
            return Errors(value, None)
        tolerance = GRADIENT_TOLERANCE + 2 * torch.finfo(measurement.dtype).eps  # a 16-bit gradient is rounded
        return Errors(value, _compared("gradient", gradients, true_gradients, tolerance))
    except CheckFailed as error:
        return str(error)


@functools.lru_cache(maxsize=1)  # one problem's contenders follow one another
def _truth(measurement: Measurement, truth: Callable[..., Outputs] | None) -> tuple[list[Tensor], list[Tensor]]:
    double = tuple(
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs(measurement, 0)
    )
    return _results(truth or contender(measurement), double, measurement.suite.leaves)


def _results(
    call: Callable[..., Outputs], tensors: tuple[Tensor, ...], leaves: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    outputs = call(*tensors)
    if not leaves:
        return list(outputs), []
    gradients = torch.autograd.grad(outputs, [tensors[i] for i in leaves], upstream_of(outputs))
    return [y.detach() for y in outputs], list(gradients)


def _compared(what: str, ours: list[Tensor], truth: list[Tensor], tolerance: float) -> float:
    """The largest relative error, each tensor judged by itself."""
    if len(ours) != len(truth):
        raise CheckFailed(f"{len(ours)} {what}s, expected {len(truth)}")
    return max(_difference(f"{what} {i}", x, y, tolerance) for i, (x, y) in enumerate(zip(ours, truth, strict=True)))


def _difference(what: str, x: Tensor, truth: Tensor, tolerance: float) -> float:
    if x.shape != truth.shape:
        raise CheckFailed(f"{what}: shape {tuple(x.shape)}, expected {tuple(truth.shape)}")
    if not truth.is_floating_point():
        if not torch.equal(x, truth):
            raise CheckFailed(f"{what}: {int((x != truth).sum())} of {truth.numel()} indices differ")
        return 0.0
    error = float((x.to(truth.dtype) - truth).abs().amax() / truth.abs().amax().clamp(min=1e-300))
    if not error <= tolerance:  # NaN is no pass
        raise CheckFailed(f"{what}: {error:.2g} of the largest off, at most {tolerance:.2g}")
    return error
