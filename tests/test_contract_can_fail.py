"""Every promise of the contract, broken on purpose: a check that cannot fail would promise nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mlot_kernels.cases import Case
from mlot_kernels.ops.match_columns import reference as indices
from mlot_kernels.ops.row_entropy import reference
from mlot_kernels.registry import OPERATORS, Operator
from tests import contract

if torch.cuda.is_available():
    pytest.skip("the broken backends pose as 'cpu', which takes no CUDA tensors", allow_module_level=True)

OPERATOR = OPERATORS["row_entropy"]
INDICES = OPERATORS["match_columns"]


def case(name: str, dtype: torch.dtype = torch.float32, operator: Operator = OPERATOR) -> Case:
    return next(c for c in contract.cases_of(operator, dtype, "cpu") if c.name == name)


def first(change: Callable[..., Tensor], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its first output changed; ``change`` gets that output and the arguments."""

    def changed(*arguments: Any) -> tuple[Any, ...]:
        output, *rest = function(*arguments)
        return change(output, *arguments), *rest

    return changed


@contextlib.contextmanager
def posing(forward: Any = reference.forward, backward: Any = reference.backward) -> Iterator[None]:
    """The two implementations as backend ``cpu``: only the reference is checked less strictly than a kernel."""
    with mock.patch.dict(OPERATOR.forward, cpu=forward), mock.patch.dict(OPERATOR.backward, cpu=backward):
        yield


def row_by_row(*arguments: Any) -> tuple[Tensor, ...]:
    """The forward with a temporary of one row: what the bound on memory allows."""
    values, index, *rest = arguments
    outputs = [torch.zeros(index.shape) for _ in range(8)]
    for b in range(index.shape[0]):
        for a in range(index.shape[1]):
            at = index[b : b + 1, a : a + 1].clamp(max=0)
            i = int(index[b, a])
            parts = reference.forward(values[b : b + 1, i : i + 1], at, *rest)
            for output, part in zip(outputs, parts, strict=True):
                output[b, a] = part[0, 0]
    return tuple(outputs)


def noisy(output: Tensor, *_: Any) -> Tensor:
    return output + 1e-6 * torch.rand_like(output)


def stretched(output: Tensor, *_: Any) -> Tensor:
    return output * 1.01


def mixed(output: Tensor, *_: Any) -> Tensor:
    return output + 1e-3 * output.mean(0, keepdim=True)


def reads_all(output: Tensor, values: Tensor, *_: Any) -> Tensor:
    return output + 0 * values.sum()


def quiet(output: Tensor, *_: Any) -> Tensor:
    return output.nan_to_num()


def waits(output: Tensor, *_: Any) -> Tensor:
    return output * (1 if float(output.sum()) < 1e30 else 0)


def transposed(output: Tensor, *_: Any) -> Tensor:
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def spoils(output: Tensor, grad: Tensor, *saved: Any) -> Tensor:
    saved[-3].mul_(2)  # a saved row scalar
    return output


BROKEN = {
    "fidelity, value": (contract.fidelity, {"forward": stretched}, ("odd width",)),
    "fidelity, gradient": (contract.fidelity, {"backward": stretched}, ("odd width",)),
    "gradcheck": (contract.gradcheck, {"backward": stretched}, ("odd width", torch.float64)),
    "determinism": (contract.determinism, {"forward": noisy}, ("odd width",)),
    "independence": (contract.independence, {"forward": mixed}, ("odd width",)),
    "what does not count": (contract.uncounted, {"forward": reads_all}, ("some rows count",)),
    "gradient where nothing counts": (
        contract.uncounted,
        {"backward": lambda output, *_: output + (output == 0)},
        ("some rows count",),
    ),
    "NaN is swallowed": (contract.nan_shows, {"forward": quiet}, ("odd width",)),
    "NaN spreads": (contract.nan_shows, {"forward": reads_all}, ("odd width",)),
    "second backward": (contract.composes, {"backward": spoils}, ("standardized",)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found(name):
    check, changes, (case_name, *dtype) = BROKEN[name]
    sound = {"forward": reference.forward, "backward": reference.backward}
    with posing(**sound):
        check(case(case_name, *dtype), "cpu")
    with (
        posing(**{**sound, **{part: first(change, sound[part]) for part, change in changes.items()}}),
        pytest.raises((AssertionError, RuntimeError)),
    ):
        check(case(case_name, *dtype), "cpu")


def next_best(columns: Tensor, *_: Any) -> Tensor:
    return columns.roll(1, -1)


def same_for_all(columns: Tensor, *_: Any) -> Tensor:
    return columns[:, :1].expand_as(columns).contiguous()


def refuses_to_choose(columns: Tensor, *_: Any) -> Tensor:
    return torch.full_like(columns, -1)


def at_random(columns: Tensor, *_: Any) -> Tensor:
    return columns[:, torch.randperm(columns.shape[1])]


def of_the_first(columns: Tensor, *_: Any) -> Tensor:
    return columns[:1].expand_as(columns).contiguous()


def reads_all_rows(columns: Tensor, values: Tensor, *_: Any) -> Tensor:
    return columns + values.isnan().any().long()


def hides_nan(columns: Tensor, *_: Any) -> Tensor:
    return columns.clamp(min=0)


def other_dtype(columns: Tensor, *_: Any) -> Tensor:
    return columns.int()


BROKEN_INDICES = {
    "fidelity, greedy": (contract.fidelity, next_best, "odd width, greedy"),
    "fidelity, optimal": (contract.fidelity, next_best, "odd width, optimal"),
    "fidelity, one column for all": (contract.fidelity, same_for_all, "odd width, greedy"),
    "fidelity, one column for all, optimal": (contract.fidelity, same_for_all, "odd width, optimal"),
    "fidelity, no choice, greedy": (contract.fidelity, refuses_to_choose, "odd width, greedy"),
    "fidelity, no choice, optimal": (contract.fidelity, refuses_to_choose, "odd width, optimal"),
    "fidelity, a choice where there is none": (contract.fidelity, hides_nan, "fewer columns than k, greedy"),
    "fidelity, dtype": (contract.fidelity, other_dtype, "odd width, greedy"),
    "determinism": (contract.determinism, at_random, "odd width, greedy"),
    "independence": (contract.independence, of_the_first, "odd width, greedy"),
    "what does not count": (contract.uncounted, reads_all_rows, "some rows count, greedy"),
    "NaN is swallowed": (contract.nan_shows, hides_nan, "odd width, greedy"),
    "NaN spreads": (contract.nan_shows, reads_all_rows, "odd width, greedy"),
    "transformations": (contract.composes, at_random, "odd width, greedy"),
}


@pytest.mark.parametrize("name", BROKEN_INDICES)
def test_a_broken_promise_of_indices_is_found(name):
    check, change, case_name = BROKEN_INDICES[name]
    sound = case(case_name, operator=INDICES)
    with mock.patch.dict(INDICES.forward, cpu=indices.match_columns):
        check(sound, "cpu")
    broken = {"cpu": lambda *arguments: change(indices.match_columns(*arguments), *arguments)}
    with mock.patch.dict(INDICES.forward, broken), pytest.raises(AssertionError):
        check(sound, "cpu")


def test_an_output_without_its_gradient_is_found():
    sound = case("odd width")

    def constant(inputs: tuple[Tensor, ...], backend: str | None) -> tuple[Tensor, ...]:
        return tuple(y.detach() for y in sound.call(inputs, backend))

    with pytest.raises(RuntimeError, match="does not require grad"):
        contract.fidelity(Case(sound.name, sound.inputs, constant, sound.definition, (2,), (2,), (0,)), "reference")


def test_a_host_sync_is_found():
    with posing():
        contract.no_host_sync(OPERATOR, case("odd width"), "cpu")
    with posing(forward=first(waits, reference.forward)), pytest.raises(AssertionError, match="waits for the device"):
        contract.no_host_sync(OPERATOR, case("odd width"), "cpu")


def test_a_temporary_of_the_logits_size_is_found():
    frugal = posing(
        forward=row_by_row, backward=lambda grad, values, index, *_: (torch.empty_like(values), index * 1.0)
    )
    with frugal:
        contract.memory(OPERATOR, case("many rows"), "cpu")
    with posing(), pytest.raises(AssertionError, match="beside the outputs"):
        contract.memory(OPERATOR, case("many rows"), "cpu")


def test_wrong_strides_are_found():
    with posing():
        contract.opcheck(OPERATOR, case("odd width"), "cpu")
    with posing(backward=first(transposed, reference.backward)), pytest.raises(Exception, match="Stride mismatch"):
        contract.opcheck(OPERATOR, case("odd width"), "cpu")


def test_a_graph_break_is_found():
    sound = case("odd width")

    def breaks(inputs: tuple[Tensor, ...], backend: str | None) -> tuple[Tensor, ...]:
        if inputs[0].sum() > 1e30:
            raise ValueError
        return sound.call(inputs, backend)

    broken = Case(sound.name, sound.inputs, breaks, sound.definition, (2,), (2,), (0,))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        contract.compiles([broken], "reference", "aot_eager")


def test_a_second_derivative_in_silence_is_found():
    sound = case("odd width")

    def constant(inputs: tuple[Tensor, ...], _: str | None) -> tuple[Tensor, ...]:
        return (inputs[0].square().sum(-1),)  # differentiable twice: the gradient is no operator's

    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        contract.second_derivative_raises(
            Case(sound.name, sound.inputs, constant, sound.definition, (2,), (2,), (0,)), "reference"
        )


def test_a_fallback_in_silence_is_found():
    sound = case("odd width")
    obliging = Case(
        sound.name, sound.inputs, lambda inputs, _: sound.call(inputs, None), sound.definition, (2,), (2,), (0,)
    )
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        contract.refuses_other_backends(OPERATOR, obliging, "reference")
