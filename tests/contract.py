"""The promises of every operator on every backend, one function each; ``test_contract.py`` runs them over the registry.

``test_contract_can_fail.py`` breaks each promise on purpose and sees it found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mlot_kernels import parity
from mlot_kernels.cases import Case
from mlot_kernels.registry import Operator
from tests.dispatch_modes import Allocations, NoHostSync

# Two promises that `python -m mlot_kernels selftest` checks, too, and what they stand on.
cases_of = parity.cases_of
run = parity.run
fidelity = parity.fidelity
gradcheck = parity.gradcheck


def determinism(case: Case, backend: str) -> None:
    """Two runs agree to the bit, on any number of threads (reference: on the same number)."""
    threads = torch.get_num_threads()
    try:
        torch.use_deterministic_algorithms(False)  # which the tests' poison needs, and which would hide what is not
        first = run(case, backend)
        _same(run(case, backend), first, exact=True)
        torch.set_num_threads(1 if threads > 1 else 2)
        _same(run(case, backend), first, exact=backend != "reference")
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True, warn_only=True)


def independence(case: Case, backend: str) -> None:
    """A sequence alone gives what it gives in its batch: to the bit (reference: to rounding)."""
    assert case.sequence is not None
    outputs, gradients = run(case, backend)
    upstream = parity.upstream_of(tuple(outputs))
    for b in range(case.inputs[0].shape[0]):
        alone = case.sequence(b)
        leaves = tuple(x.detach().requires_grad_() for x in alone.inputs)
        single = alone.call(leaves, backend)
        weights = [w.narrow(d, b, 1) for w, d in zip(upstream, case.batch_dimensions, strict=True)]
        single_gradients = parity.gradients_of(single, leaves, weights)
        expected = [y.narrow(d, b, 1) for y, d in zip(outputs, case.batch_dimensions, strict=True)]
        _same(
            (list(single), single_gradients),
            (expected, [g[b : b + 1] for g in gradients]),
            exact=backend != "reference",
        )


def uncounted(case: Case, backend: str) -> None:
    """NaN and inf where nothing counts change no bit, and the gradient there is 0."""
    assert case.uncounted is not None
    poisoned = case.uncounted(case.inputs)
    outputs, gradients = run(case, backend)
    poisoned_outputs, poisoned_gradients = run(case, backend, poisoned)
    _same((poisoned_outputs, poisoned_gradients), (outputs, gradients), exact=True)
    for x, gradient in zip(poisoned, poisoned_gradients, strict=bool(gradients)):
        assert (gradient[~x.isfinite()] == 0).all()


def nan_shows(case: Case, backend: str) -> None:
    """A NaN that counts shows in its sequence, in every output and in a gradient, and in no other sequence.

    Indices show it as -1.
    """
    assert case.counted is not None
    outputs, gradients = run(case, backend)
    values = case.inputs[0].clone()
    values[case.counted] = float("nan")
    bad_outputs, bad_gradients = run(case, backend, (values, *case.inputs[1:]))
    for y, d in zip(bad_outputs, case.batch_dimensions, strict=True):
        own = y.select(d, 0)
        assert (own.isnan() if y.is_floating_point() else own == -1).any(), case.name
    assert not gradients or any(gradient[0].isnan().any() for gradient in bad_gradients)
    if case.sequence is None:
        return
    rest = slice(1, None)
    others = [y.transpose(0, d)[rest] for y, d in zip(outputs, case.batch_dimensions, strict=True)]
    bad_others = [y.transpose(0, d)[rest] for y, d in zip(bad_outputs, case.batch_dimensions, strict=True)]
    _same((bad_others, [g[rest] for g in bad_gradients]), (others, [g[rest] for g in gradients]), exact=True)


# What a CPU sorts in place, in 4 bytes an element, torch.topk orders for Triton as 8-byte keys, with room for 4 k of a
# row before and for its own outputs behind: the same orders of growth, O(N k + B V), with another constant.
ROOM = {"triton": 4}


def memory(operator: Operator, case: Case, backend: str) -> None:
    """Beside its outputs and gradients a call holds no more than ``case.memory`` floats at any time (see ``ROOM``)."""
    assert case.memory is not None
    with _inside(operator, backend, Allocations) as meters:
        run(case, backend)
    assert meters, "the backend did not run"
    allowed = 4 * case.memory * ROOM.get(backend, 1)
    for meter in meters:
        extra = meter.peak - meter.kept
        assert extra <= allowed, f"{extra} bytes beside the outputs, {allowed} allowed"


def no_host_sync(operator: Operator, case: Case, backend: str) -> None:
    """Nothing waits for the device: no operator is called that would; on a GPU, a CUDA graph captures the call."""
    with _inside(operator, backend, NoHostSync) as modes:
        run(case, backend)
    assert modes, "the backend did not run"
    with NoHostSync():  # what the public function does around it
        run(case, backend)
    if case.inputs[0].device.type == "cuda":
        leaves = tuple(x.detach().requires_grad_() for x in case.inputs)
        upstream = parity.upstream_of(case.call(leaves, backend))  # drawn on the CPU
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            parity.gradients_of(case.call(leaves, backend), leaves, upstream)


def opcheck(operator: Operator, case: Case, backend: str) -> None:
    """torch's own checks of the operator's ops: schema, fakes, autograd registration, tracing."""
    calls: dict[str, tuple[Any, ...]] = {}

    def recorded(table: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[table] = arguments
            return function(*arguments)

        return call

    with _replaced(operator, backend, recorded):
        run(case, backend)
    floats = [x.data_ptr() for x in case.inputs]
    joined = tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() and x.data_ptr() in floats else x
        for x in calls["forward"]
    )
    detached = {
        table: tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
        for table, arguments in calls.items()
    }
    ops = [(operator.name, joined)]
    if operator.function is not None:
        ops += [(f"{operator.name}_{table}", detached[table]) for table in ("forward", "backward")]
    for name, arguments in ops:
        torch.library.opcheck(getattr(torch.ops.mlot, name).default, (*arguments, backend))


def composes(case: Case, backend: str) -> None:
    """torch.func, autocast, checkpointing and a second backward through one graph give the same.

    Indices pass through them as constants.
    """
    outputs, gradients = run(case, backend)
    upstream = parity.upstream_of(tuple(outputs))

    def total(*inputs: Tensor) -> Tensor:
        value = sum(
            (y.masked_fill(~y.isfinite(), 0) * w).sum()
            for y, w in zip(case.call(inputs, backend), upstream, strict=True)
        )
        return value if gradients else value * sum(x.sum() for x in inputs)  # type: ignore[return-value]

    by_total = gradients
    if not gradients:
        constant = sum((y * w).sum() for y, w in zip(outputs, upstream, strict=True))
        by_total = [torch.full_like(x, constant) for x in case.inputs]

    everything = tuple(range(len(case.inputs)))
    by_func, value = torch.func.grad_and_value(total, argnums=everything)(*case.inputs)
    _same(([value], list(by_func)), ([total(*case.inputs)], by_total), exact=True)

    with torch.autocast(case.inputs[0].device.type, dtype=torch.bfloat16):
        cast = run(case, backend)
    _same(cast, (outputs, gradients), exact=True)

    leaves = tuple(x.detach().requires_grad_() for x in case.inputs)
    stored = torch.utils.checkpoint.checkpoint(total, *leaves, use_reentrant=False)
    _same(([], list(torch.autograd.grad(stored, leaves))), ([], by_total), exact=True)

    live = case.call(leaves, backend)
    for _ in range(2):
        again = parity.gradients_of(live, leaves, upstream, retain_graph=True)
        _same(([], again), ([], gradients), exact=True)


def second_derivative_raises(case: Case, backend: str) -> None:
    """A gradient that was made with ``create_graph`` is no constant: differentiating it raises."""
    leaves = tuple(x.detach().requires_grad_() for x in case.inputs)
    outputs = case.call(leaves, backend)
    gradients = torch.autograd.grad(outputs, leaves, parity.upstream_of(outputs), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(sum((g**2).sum() for g in gradients), leaves)


def compiles(cases: list[Case], backend: str, compiler: str) -> None:
    """``torch.compile(fullgraph=True)`` traces the call, at several sizes, and the result is the same."""
    from torch._dynamo.testing import CompileCounterWithBackend  # seconds, in every lane that compiles nothing

    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for case in cases:
            counter = CompileCounterWithBackend(compiler)
            compiled = torch.compile(
                lambda inputs, case=case: case.call(inputs, backend), fullgraph=True, dynamic=True, backend=counter
            )
            _same(parity.differentiate(compiled, case.inputs), run(case, backend), exact=True)
            if case is cases[0]:  # an unadorned case, whose call takes inputs of any width
                frames = counter.frame_count
                narrow = tuple(x[..., :-2].contiguous() for x in case.inputs)
                _same(parity.differentiate(compiled, narrow), run(case, backend, narrow), exact=True)
                assert counter.frame_count == frames, "another width is compiled anew"


def refuses_other_backends(operator: Operator, case: Case, backend: str) -> None:
    """A backend that is named runs or raises, and the message says what could run; nothing falls back."""
    from mlot_kernels import BackendUnavailable, use_backend
    from mlot_kernels.backends import BACKENDS

    for other in set(BACKENDS) - set(operator.forward):
        with pytest.raises(BackendUnavailable, match=rf"{operator.name}.*'{other}'.*usable here: .*{backend}"):
            case.call(case.inputs, other)
        with use_backend(other), pytest.raises(BackendUnavailable):
            case.call(case.inputs, None)
    with pytest.raises(ValueError, match="backend must be one of reference"):
        case.call(case.inputs, "fastest")


def refuses_distributed_tensors(case: Case) -> None:
    """A DTensor is named, with a way out, in every place that takes a tensor."""
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    for i in range(len(case.inputs)):
        spread = DTensor.from_local(case.inputs[i].cpu(), mesh, [Replicate()])
        with pytest.raises(TypeError, match=r"is a DTensor.*to_local"):
            case.call((*case.inputs[:i], spread, *case.inputs[i + 1 :]), None)


def _same(ours: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]], *, exact: bool) -> None:
    for kind, x, y in zip(("outputs", "gradients"), ours, expected, strict=True):
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            wide, last_places = torch.promote_types(a.dtype, torch.float32), 0.0
            if a.is_floating_point() and not exact:
                last_places = 64 * torch.finfo(wide).eps + (a.dtype != wide) * 2 * torch.finfo(a.dtype).eps
            largest = float(b.detach().nan_to_num(0, 0, 0).abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(
                a.detach(),
                b.detach(),
                rtol=0,
                atol=last_places * max(1.0, largest),
                equal_nan=True,
                msg=lambda text, kind=kind, i=i: f"{kind}[{i}]: {text}",
            )


@contextlib.contextmanager
def _replaced(
    operator: Operator, backend: str, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Run with the backend's implementations wrapped: dispatch modes do not see what an op does inside."""
    tables = {"forward": operator.forward}
    if operator.function is not None:
        tables["backward"] = operator.backward
    with contextlib.ExitStack() as stack:
        for name, table in tables.items():
            stack.enter_context(mock.patch.dict(table, {backend: wrap(name, table[backend])}))
        yield


@contextlib.contextmanager
def _inside(operator: Operator, backend: str, mode: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run with a new dispatch mode of this kind inside each implementation's call; yields the modes that ran."""
    modes: list[Any] = []

    def wrap(_: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            modes.append(mode())
            with modes[-1]:
                result = function(*arguments)
            if isinstance(modes[-1], Allocations):
                modes[-1].keep(result if isinstance(result, tuple) else (result,))
            return result

        return call

    with _replaced(operator, backend, wrap):
        yield modes
