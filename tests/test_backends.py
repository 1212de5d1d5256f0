import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mlot_kernels
from mlot_kernels import BackendUnavailable, backends, explain, row_entropy, use_backend
from mlot_kernels.registry import OPERATORS

X = torch.randn(2, 7)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_import_is_light_and_touches_no_gpu():
    done = run_python(
        "import torch, sys; before = set(sys.modules); import mlot_kernels\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert new <= {'mlot_kernels'} | set(sys.stdlib_module_names), new\n"
        "assert not torch.cuda.is_initialized()"
    )
    assert done.returncode == 0, done.stderr


def test_public_names_exist():
    for name in mlot_kernels.__all__:
        assert getattr(mlot_kernels, name).__doc__, name


def test_the_environment_names_a_backend():
    code = "import torch, mlot_kernels as m; print(m.row_entropy(torch.zeros(1, 2)).item())"
    assert run_python(code, MLOT_BACKEND="reference").stdout.startswith("0.69")
    assert "BackendUnavailable: row_entropy: backend 'cuda'" in run_python(code, MLOT_BACKEND="cuda").stderr
    assert "MLOT_BACKEND must be one of reference, cpu" in run_python(code, MLOT_BACKEND="gpu").stderr


def test_strongest_first():
    with use_backend("cuda"):
        with pytest.raises(BackendUnavailable, match="row_entropy: backend 'cuda': not implemented"):
            row_entropy(X)
        row_entropy(X, backend="reference")
        with use_backend("reference"):
            row_entropy(X)
        with pytest.raises(BackendUnavailable):
            row_entropy(X)
    row_entropy(X)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="use_backend's name must be one of reference, cpu, triton, cuda, got 'fast'"):
        use_backend("fast").__enter__()
    with pytest.raises(ValueError, match="backend must be one of"):
        row_entropy(X, backend="fast")


def test_explain_says_what_would_run_and_why_not():
    said = explain(row_entropy, X)
    assert said.chosen == "reference"
    assert said.refusals["reference"] is None
    assert "* reference" in str(said)
    assert "not implemented" in said.refusals["cuda"]
    assert explain(row_entropy, X, backend="cuda").chosen is None
    with pytest.raises(TypeError, match="explain takes an operator"):
        explain(len, [])
    with pytest.raises(ValueError, match="at least one column"):
        explain(row_entropy, X[:, :0])
    row_entropy(X)  # and calls run again


def test_explaining_leaves_other_threads_alone():
    stop, errors = threading.Event(), []

    def work():
        while not stop.is_set():
            try:
                row_entropy(X)
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(50):
        explain(row_entropy, X)
    stop.set()
    thread.join()
    assert not errors


def test_blocks_that_end_out_of_order_leave_nothing_behind():
    first, second = use_backend("reference"), use_backend("cuda")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(BackendUnavailable):
        row_entropy(X)
    second.__exit__(None, None, None)
    row_entropy(X)


def test_an_implementation_may_refuse_a_call(monkeypatch):
    table = OPERATORS["row_entropy"].forward
    picky = backends.refusing(lambda *arguments: table["reference"](*arguments), lambda values, *_: "too narrow")
    monkeypatch.setitem(table, "cpu", picky)
    assert explain(row_entropy, X).refusals["cpu"] == ("too narrow" if X.device.type == "cpu" else None)
    assert explain(row_entropy, X).chosen == "reference"
    with pytest.raises(BackendUnavailable, match="backend 'cpu': too narrow; usable here: reference"):
        row_entropy(X, backend="cpu")
    picky.refuses = lambda *_: None
    assert explain(row_entropy, X).chosen == "cpu"


def test_a_device_that_is_not_the_backends_is_refused():
    everywhere = dict.fromkeys(backends.BACKENDS, len)
    for name, words in (("cuda", "it needs cuda"), ("triton", "cpu|triton is not installed")):
        with pytest.raises(BackendUnavailable, match=words):
            backends.resolve("anything", everywhere, (X,), name)


def test_the_reference_on_a_gpu_warns_once(monkeypatch):
    monkeypatch.setattr(backends, "_warned", False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = torch.empty(2, device="cuda")
        with pytest.warns(UserWarning, match="runs on the plain torch reference"):
            assert backends.resolve("row_entropy", {"reference": len}, (on_gpu,)) == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backends.resolve("row_entropy", {"reference": len}, (on_gpu,))
            backends.resolve("row_entropy", {"reference": len}, (on_gpu,), "reference")
        assert backends.resolve("anything", {"reference": len, "cuda": len}, (on_gpu,)) == "cuda"


def test_raw_ops_name_a_missing_backend():
    with pytest.raises(BackendUnavailable, match="mlot::row_entropy_forward: no backend 'cuda'"):
        torch.ops.mlot.row_entropy_forward(X[None], torch.zeros(1, 2).long(), None, None, 1.0, False, 7, "cuda")
