"""What every operator promises, over the registry: an operator comes under it by being registered."""

from __future__ import annotations

import os

import pytest
import torch

import mlot_kernels
from mlot_kernels import explain, native
from mlot_kernels.cases import Case
from mlot_kernels.registry import OPERATORS, Operator
from tests import contract
from tests.conftest import CUDA_ON_HOST, DEVICE, FULL, INTERPRETED

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def runs_here(backend: str) -> bool:
    if backend == "triton":
        return DEVICE == "cuda" or INTERPRETED
    if native.MISSING.get(backend):
        return False
    if backend == "cuda" and CUDA_ON_HOST:
        return True
    return backend == "reference" or backend == DEVICE


def refused(operator: Operator, backend: str, case: Case) -> bool:
    """Whether the backend says in words that it cannot run this call; tests/ops hold it to what it says."""
    if not hasattr(operator.forward[backend], "refuses"):
        return False
    return explain(case.call, case.inputs, backend).chosen is None


PAIRS = [(operator, backend) for operator in OPERATORS.values() for backend in operator.forward if runs_here(backend)]
CASES = [
    pytest.param(operator, backend, i, id=f"{operator.name}-{backend}-{case.name}")
    for operator, backend in PAIRS
    for i, case in enumerate(contract.cases_of(operator, torch.float32, DEVICE))
    if not refused(operator, backend, case)
]
by_operator = pytest.mark.parametrize(
    ("operator", "backend"), [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in PAIRS]
)
by_case = pytest.mark.parametrize(("operator", "backend", "i"), CASES)


def case_of(operator: Operator, i: int, dtype: torch.dtype = torch.float32) -> Case:
    return contract.cases_of(operator, dtype, DEVICE)[i]


def cases(operator: Operator, backend: str, *having: str, dtype: torch.dtype = torch.float32) -> list[Case]:
    """The operator's cases that the backend runs and for which all of these attributes say something."""
    found = [
        case
        for case in contract.cases_of(operator, dtype, DEVICE)
        if all(getattr(case, a) for a in having) and not refused(operator, backend, case)
    ]
    assert found, f"{operator.name} has no case with {', '.join(having)}"
    return found


def test_every_operator_has_all_its_rooms():
    for name, operator in OPERATORS.items():
        differentiable = operator.function is not None
        assert operator.backward.keys() == (operator.forward.keys() if differentiable else set()), name
        assert "reference" in operator.forward, name
        folder = os.path.join(os.path.dirname(mlot_kernels.__file__), "ops", name)
        assert {"op.py", "reference.py", "cases.py", "README.md"} <= set(os.listdir(folder)), name
        for suffix in ("", "_forward", "_backward") if differentiable else ("",):
            assert hasattr(torch.ops.mlot, name + suffix)


@by_case
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_fidelity(operator, backend, i, dtype):
    contract.fidelity(case_of(operator, i, dtype), backend)


# Without ties, kinks and infinities, at which test_fidelity compares the gradient with the definition's.
@pytest.mark.parametrize(
    ("operator", "backend", "i"),
    [
        p
        for p in CASES
        if p.values[0].function is not None and contract.cases_of(p.values[0], torch.float64, "cpu")[p.values[2]].smooth
    ],
)
def test_gradcheck(operator, backend, i):
    contract.gradcheck(case_of(operator, i, torch.float64), backend)


@by_operator
def test_determinism(operator, backend):
    for case in cases(operator, backend):
        contract.determinism(case, backend)


@by_operator
def test_a_sequence_does_not_depend_on_its_batch(operator, backend):
    for case in cases(operator, backend, "sequence"):
        contract.independence(case, backend)


@by_operator
def test_what_does_not_count_is_not_read(operator, backend):
    found = [case for case in cases(operator, backend) if case.uncounted is not None]
    assert found or operator.name == "pairwise_cost"  # it knows no lengths: its user masks the costs
    for case in found:
        contract.uncounted(case, backend)


@by_operator
def test_nan_shows_where_it_counts_and_nowhere_else(operator, backend):
    for case in cases(operator, backend, "counted"):
        contract.nan_shows(case, backend)


@by_operator
def test_no_host_sync(operator, backend):
    found = [case for case in cases(operator, backend) if not case.waits]
    assert (
        len(found) == len(cases(operator, backend)) or operator.name == "match_columns"
    )  # its method "optimal" calls SciPy
    for case in found:
        contract.no_host_sync(operator, case, backend)


@by_operator
def test_memory(operator, backend):
    if backend == "reference":
        pytest.skip("the reference is exempt from the bound on memory, which serves plain definitions badly")
    for case in cases(operator, backend):
        if case.memory is not None:
            contract.memory(operator, case, backend)


@by_operator
def test_opcheck(operator, backend):
    found = cases(operator, backend)
    chosen = [found[0], *(c for c in found if "permuted" in c.name or "every" in c.name)]
    for case in chosen[-1:] if INTERPRETED and not FULL else chosen:  # each runs the kernels dozens of times
        contract.opcheck(operator, case, backend)


@by_operator
def test_composes(operator, backend):
    for case in cases(operator, backend, "smooth"):
        contract.composes(case, backend)


@by_operator
def test_second_derivatives_raise(operator, backend):
    if operator.function is None:
        pytest.skip("indices have no gradient, and so no second one")
    for case in cases(operator, backend, "smooth"):
        if all(x.numel() for x in case.inputs):
            contract.second_derivative_raises(case, backend)


@by_operator
@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is not traced")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles(operator, backend, compiler):
    found = cases(operator, backend, "smooth")
    contract.compiles(found if FULL else found[:2] if compiler == "inductor" else found[:6], backend, compiler)


@by_operator
def test_other_backends_are_refused(operator, backend):
    contract.refuses_other_backends(operator, cases(operator, backend)[0], backend)


@by_operator
def test_distributed_tensors_are_refused(operator, backend):
    for case in cases(operator, backend, "smooth"):
        contract.refuses_distributed_tensors(case)
