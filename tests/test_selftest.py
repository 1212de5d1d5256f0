"""The self-test passes here, and finds what is broken."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mlot_kernels import backends, losses, parity, selftest
from mlot_kernels.__main__ import main
from mlot_kernels.cases import Case
from mlot_kernels.losses.cases import LOSSES, cases
from mlot_kernels.ops.row_entropy import reference
from mlot_kernels.registry import OPERATORS

OPERATOR = OPERATORS["row_entropy"]
CASES = len(parity.cases_of(OPERATOR, torch.float32, "cpu"))
ON_CPU = ("selftest", "--device", "cpu", "--op", "row_entropy")

# As if none of these were installed: no finder finds them.
WITHOUT = """
import runpy, sys

HIDDEN = {"numpy", "rich", "triton", "scipy", "pytest", "hypothesis", "matplotlib"}


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, *rest)


sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
for name in HIDDEN:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} was imported")
sys.argv = ["mlot_kernels", *sys.argv[1:]]
runpy.run_module("mlot_kernels", run_name="__main__")
"""


@contextlib.contextmanager
def posing(forward: Callable[..., Any] = reference.forward, backward: Any = reference.backward) -> Iterator[None]:
    """These two as backend ``cpu`` of ``row_entropy``."""
    with mock.patch.dict(OPERATOR.forward, cpu=forward), mock.patch.dict(OPERATOR.backward, cpu=backward):
        yield


def stretched_where_permuted(values: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    entropy, *saved = reference.forward(values, *arguments)
    return (entropy if values.is_contiguous() else entropy * 1.01), *saved


def crashes_in_half(values: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    if values.dtype == torch.float16:
        raise RuntimeError("no kernel image")
    return reference.forward(values, *arguments)


def stretched_backward_where_permuted(grad: Tensor, values: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    gradient, *rest = reference.backward(grad, values, *arguments)
    return (gradient if values.is_contiguous() else gradient * 1.01), *rest


def test_a_sound_operator_passes(capsys):
    with posing():
        assert main([*ON_CPU]) == 0
    said = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in said[2:-1]]
    assert [row[:3] for row in rows] == [["row_entropy", backend, str(4 * CASES)] for backend in ("reference", "cpu")]
    assert all(row[-1] == "ok" and all(cell.endswith("%") for cell in row[3:-1]) for row in rows)
    assert said[-1] == "All checks passed"


def test_a_wrong_value_is_named(capsys):
    with posing(forward=stretched_where_permuted):
        assert main([*ON_CPU]) == 1
    said = capsys.readouterr().out
    failures = [line for line in said.splitlines() if line.startswith("FAILED")]
    assert any("row_entropy on cpu, float32, permuted: output 0: error" in line for line in failures)
    assert not any("odd width" in line or "on reference" in line for line in failures)
    assert said.splitlines()[-1] == f"{len(failures)} checks failed"


def test_a_wrong_gradient_is_named(capsys):
    with posing(backward=stretched_backward_where_permuted):
        assert main([*ON_CPU, "--backend", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "row_entropy on cpu, bfloat16, permuted: gradient 0: error" in said
    (gradcheck,) = (line for line in said.splitlines() if "gradcheck, permuted: " in line)
    assert gradcheck.startswith("FAILED: row_entropy on cpu, gradcheck, permuted: Jacobian mismatch")
    assert len(gradcheck) < 250  # without the Jacobians


def test_a_crash_is_a_failure_and_the_rest_runs():
    with posing(forward=crashes_in_half):
        (result,) = selftest.run("cpu", "cpu", ["row_entropy"])
    assert {failure.check for failure in result.failures} == {"float16"}
    assert result.failures[0].message == "RuntimeError: no kernel image"
    assert result.shares.keys() == {"bfloat16", "float32", "float64"}
    assert result.gradchecks > 10


def test_what_a_backend_refuses_is_counted_and_not_failed(capsys):
    only_float32 = backends.refusing(
        lambda *arguments: reference.forward(*arguments),
        lambda values, *_: None if values.dtype == torch.float32 else "it takes float32",
    )
    with posing(forward=only_float32):
        assert main([*ON_CPU, "--backend", "cpu"]) == 0
    said = capsys.readouterr().out
    row = next(line.split() for line in said.splitlines() if line.startswith("row_entropy"))
    assert row[1:8] == ["cpu", str(CASES), "of", str(4 * CASES), "(1)", "-", "-"]
    assert row[-2:] == ["-", "-"]
    assert "(1) row_entropy: backend 'cpu': it takes float32; usable here: reference" in said


def test_a_backend_that_cannot_run_is_said(capsys):
    assert main([*ON_CPU, "--backend", "cuda"]) == 2
    said = capsys.readouterr()
    assert f"0 of {4 * CASES} (1)" in said.out
    assert "(1) row_entropy: backend 'cuda': " in said.out
    assert "nothing could be tested" in said.err


def test_bad_arguments(capsys):
    for arguments in (["--op", "softmax"], ["--backend", "fastest"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as stopped:
            main(["selftest", *arguments])
        assert stopped.value.code == 2
        assert "invalid choice" in capsys.readouterr().err
    for bad in ({"device": "tpu"}, {"backend": "fastest"}, {"names": ["softmax"]}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be .* got"):
            selftest.run(**bad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(capsys):
    assert main(["selftest", "--device", "cuda"]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", LOSSES)
def test_losses_pass(name):
    (result,) = selftest.run("cpu", "reference", [name])
    assert result.failures == []
    assert result.shares.keys() == result.gradient_errors.keys() == set(selftest.DTYPES)
    assert result.gradchecks >= 6


def test_every_loss_has_cases():
    assert set(LOSSES) == {name for name in losses.__all__ if name.endswith("Loss")}


def test_the_losses_inputs_are_the_same_each_time():
    for name in LOSSES:
        for first, second in zip(cases(name), cases(name), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(first.inputs, second.inputs, strict=True)), first.name


@pytest.mark.parametrize("broken", ["value", "gradient"])
def test_a_definition_that_rounds_is_found(broken):
    """A loss's definition is the loss itself: comparing the two would not find what both do wrong."""

    class Rounds(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.bfloat16().to(x) if broken == "value" and x.dtype == torch.float32 else x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.bfloat16().to(grad) if broken == "gradient" and grad.dtype == torch.float32 else grad

    def loss(inputs: tuple[Tensor, ...], backend: str | None = None) -> tuple[Tensor, ...]:
        return (Rounds.apply(inputs[0]).sum(-1),)

    case = Case("rounds", (torch.rand(3, 5),), loss, loss, (1,), (1,), (0,))
    parity.fidelity(case, "reference")
    with pytest.raises(parity.Mismatch, match=f"{broken}: .* off relative to float64, at most"):
        selftest._held_to_tolerance(case, "reference")


def test_results_are_plain_and_the_same_each_time():
    first, second = (selftest.run("cpu", names=["ULDLoss"]) for _ in range(2))
    assert first == second
    assert [asdict(result) for result in first] == json.loads(json.dumps([asdict(result) for result in first]))


def test_rich_shows_the_same_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    pytest.importorskip("rich")
    rows = [("row_entropy", "cpu", "25 of 100 (1)", "-", "FAILED", "3.1%", "-", "ok")]
    selftest._print_rich("On cpu", iter(rows))
    drawn = capsys.readouterr().out
    selftest._print_plain("On cpu", iter(rows))
    plain = capsys.readouterr().out
    words = [word.strip("│┃ ") for word in drawn.split() if word.strip("│┃┏┓┡┩└┘━┳╇─┴ ")]
    assert sorted(words) == sorted(plain.split())


@pytest.mark.parametrize("arguments", [("info",), ("selftest", "--op", "row_entropy", "match_columns")], ids=" ".join)
def test_torch_alone_is_enough(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    if arguments[0] == "info":
        assert "triton             none (not installed)" in done.stdout
    else:
        assert "(1) SciPy is not installed, and method='optimal' needs it" in done.stdout
        waits = [case.waits for case in parity.cases_of(OPERATORS["match_columns"], torch.float32, "cpu")]
        assert f"{4 * waits.count(False)} of {4 * len(waits)} (1)" in done.stdout
