"""How an implementation of an operator is held against its definition, one ``Case`` at a time.

Shared by ``python -m mlot_kernels selftest`` and by the contract tests. It needs nothing but torch, and it raises where
it could assert, so that ``python -O`` checks as much.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from mlot_kernels.cases import Case, Outputs
from mlot_kernels.registry import Operator

DOUBLE_TOLERANCE = 1e-10
NEAR_TIE = 1e-5


class Mismatch(AssertionError):
    """An implementation and the truth differ by more than is allowed; the message says where and by how much."""


@dataclass(frozen=True)
class Fidelity:
    """How near an implementation came to float64 in one case.

    Attributes:
        output_error: the largest ``max|error| / max|truth|`` of an output, over the entries that are finite in truth;
            the error itself where the truth is 0 throughout. Of indices, how much worse than the best a choice is.
        gradient_error: the same for the gradients; None where there is none.
        share: the largest error as a share of what is allowed there, 0 to 1.
    """

    output_error: float
    gradient_error: float | None
    share: float


def cases_of(operator: Operator, dtype: torch.dtype, device: str) -> list[Case]:
    """What the operator's ``cases.py`` has."""
    return importlib.import_module(f"mlot_kernels.ops.{operator.name}.cases").cases(dtype, device)


def run(case: Case, backend: str | None, inputs: tuple[Tensor, ...] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a case for fixed upstream gradients."""
    return differentiate(lambda x: case.call(x, backend), case.inputs if inputs is None else inputs)


def differentiate(
    function: Callable[[tuple[Tensor, ...]], Outputs], inputs: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of ``function`` for fixed upstream gradients."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    outputs = function(leaves)
    return [y.detach() for y in outputs], gradients_of(outputs, leaves, upstream_of(outputs))


def gradients_of(outputs: Outputs, leaves: tuple[Tensor, ...], upstream: list[Tensor], **options: Any) -> list[Tensor]:
    """None at all where all outputs are indices; other outputs must have one for each leaf, else this raises."""
    if not any(y.is_floating_point() for y in outputs):
        return []
    return list(torch.autograd.grad(outputs, leaves, upstream, **options))


def upstream_of(outputs: Outputs) -> list[Tensor]:
    """Gradients in -1..2, the same for every implementation, precision and device."""
    generator = torch.Generator().manual_seed(3)
    draw = (torch.rand(y.shape, generator=generator, dtype=torch.float64) * 3 - 1 for y in outputs)
    return [w.to(y) if y.is_floating_point() else w.to(y.device) for w, y in zip(draw, outputs, strict=True)]


def fidelity(case: Case, backend: str | None) -> Fidelity:
    """No row's error exceeds twice that of the definition in the same precision, but for rounding of the output.

    Indices are as good as the best ones in float64, up to near-ties.

    Raises:
        Mismatch: it does, or a dtype or shape differs from the definition's.
        BackendUnavailable: ``backend`` cannot run the case.
    """
    outputs, gradients = run(case, backend)
    (true_outputs, true_gradients), (plain_outputs, plain_gradients) = _defined(case)
    if case.excess is not None:
        return _as_good_as_the_best(case, case.excess, outputs, plain_outputs, true_outputs)
    scales: list[Any] = [0.0] * len(outputs) + list(case.gradient_scale(case.inputs))
    rows = [*case.output_rows, *case.input_rows]
    found: list[tuple[float, float]] = []
    for i, (ours, plain, truth) in enumerate(
        zip(outputs + gradients, plain_outputs + plain_gradients, true_outputs + true_gradients, strict=True)
    ):
        what = f"output {i}" if i < len(outputs) else f"gradient {i - len(outputs)}"
        if ours.dtype != plain.dtype:
            raise Mismatch(f"{what}: {ours.dtype}, the definition's is {plain.dtype}")
        if ours.shape != truth.shape:
            raise Mismatch(f"{what}: shape {tuple(ours.shape)}, the definition's is {tuple(truth.shape)}")
        if ours.numel() == 0:
            found.append((0.0, 0.0))
            continue
        error, plain_error = (_per_row(_difference(x.double(), truth), rows[i]) for x in (ours, plain))
        bound = _allowed(ours, truth, plain_error, rows[i], case)
        if case.inputs[0].dtype == torch.float64:
            bound = bound + 1e-14 * scales[i]
        else:
            bound = bound + 1e-6 * (1.0 if i < len(outputs) else 2 * scales[i])  # upstream gradients reach 2
        if not (error <= bound).all():
            raise Mismatch(
                f"{what}: error {error.max():.3g}, plain torch's {plain_error.max():.3g}, "
                f"{(error - bound).max():.3g} too much"
            )
        share = torch.where(error == 0, 0, error / bound)  # the bound may be 0, too
        found.append((_relative(_difference(ours.double(), truth), truth), float(share.max())))
    errors = [error for error, _ in found]
    gradient_errors = errors[len(outputs) :]
    return Fidelity(
        output_error=max(errors[: len(outputs)]),
        gradient_error=max(gradient_errors) if gradient_errors else None,
        share=max(share for _, share in found),
    )


@functools.lru_cache(maxsize=128)  # every backend is held against the same
def _defined(case: Case) -> tuple[tuple[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]:
    """Outputs and gradients of the definition, in float64 and in the inputs' precision."""
    double = tuple(x.double() for x in case.inputs)
    return differentiate(case.definition, double), differentiate(case.definition, case.inputs)


def gradcheck(case: Case, backend: str | None) -> None:
    """Finite differences in float64; columns at -inf have no derivative and are left out.

    Raises:
        Mismatch: the gradient is another one.
        BackendUnavailable: ``backend`` cannot run the case.
    """

    def finite(*inputs: Tensor) -> Outputs:
        return tuple(y.masked_fill(~y.isfinite(), 0) for y in case.call(inputs, backend))

    leaves = tuple(x.detach().requires_grad_() for x in case.inputs)
    try:
        # The fast mode compares one projection of the Jacobian and scales atol by its length: hence a small one.
        torch.autograd.gradcheck(finite, leaves, fast_mode=True, atol=1e-8, rtol=1e-4)
    except GradcheckError as error:
        raise Mismatch(str(error)) from error


def _as_good_as_the_best(
    case: Case,
    excess: Callable[[tuple[Tensor, ...], Outputs], Tensor],
    outputs: list[Tensor],
    plain_outputs: list[Tensor],
    true_outputs: list[Tensor],
) -> Fidelity:
    for i, (ours, plain) in enumerate(zip(outputs, plain_outputs, strict=True)):
        if (ours.dtype, ours.shape) != (plain.dtype, plain.shape):
            raise Mismatch(
                f"output {i}: {ours.dtype} {tuple(ours.shape)}, the definition's is {plain.dtype} {tuple(plain.shape)}"
            )
    largest = 0.0
    for choices in (true_outputs, outputs):
        worse = excess(tuple(x.double() for x in case.inputs), tuple(choices))
        if not (worse <= NEAR_TIE).all():
            raise Mismatch(f"a choice is {worse.max():.3g} worse than the best")
        largest = max(0.0, float(worse.max())) if worse.numel() else 0.0
    return Fidelity(output_error=largest, gradient_error=None, share=largest / NEAR_TIE)


def _allowed(ours: Tensor, truth: Tensor, plain_error: Tensor, rows: int, case: Case) -> Tensor:
    """The error that each row may have, but for terms that cancel."""
    largest = _per_row(truth.masked_fill(~truth.isfinite(), 0).abs(), rows)
    accumulator = torch.promote_types(ours.dtype, torch.float32)
    bound = 4 * case.condition * torch.finfo(accumulator).eps * largest
    if case.inputs[0].dtype == torch.float64:
        return bound + DOUBLE_TOLERANCE * max(1.0, case.condition) * largest
    return bound + 2 * plain_error + torch.finfo(ours.dtype).eps * largest


def _difference(x: Tensor, truth: Tensor) -> Tensor:
    """|x - truth|; 0 where both are the same infinity or NaN, inf where only one is finite."""
    same = (x == truth) | (x.isnan() & truth.isnan())
    return torch.where(same, 0, (x - truth).abs().nan_to_num(nan=float("inf")))


def _per_row(x: Tensor, rows: int) -> Tensor:
    """The largest element of each row."""
    return x if x.dim() <= rows else x.flatten(rows).amax(-1)


def _relative(difference: Tensor, truth: Tensor) -> float:
    finite = truth.isfinite()
    error, largest = (float(x.masked_fill(~finite, 0).abs().max()) for x in (difference, truth))
    return error / largest if largest > 0 else error
