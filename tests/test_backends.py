import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mlot_kernels
from mlot_kernels import BackendUnavailable, backends, explain, native, row_entropy, use_backend, verified
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


@pytest.fixture
def without_cuda(monkeypatch):
    """row_entropy has no backend cuda."""
    monkeypatch.delitem(OPERATORS["row_entropy"].forward, "cuda")


@pytest.mark.usefixtures("without_cuda")
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


@pytest.mark.usefixtures("without_cuda")
def test_explain_says_what_would_run_and_why_not():
    said = explain(row_entropy, X)
    assert said.chosen == next(name for name in backends.PREFERENCE[X.device.type] if said.refusals[name] is None)
    assert said.refusals["reference"] is None
    assert f"* {said.chosen}" in str(said)
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


def ask(index):
    """Answers as a GPU's driver would; torch.compile can trace neither."""
    return f"sm_{os.getpid() // os.getpid()}"


@pytest.fixture
def on_gpu(monkeypatch):
    """A fake tensor on a GPU of an architecture that does not exist."""
    monkeypatch.setattr(backends, "_warned", False)
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    monkeypatch.setattr(verified, "_ask", ask)
    monkeypatch.setattr(verified, "_architectures", {})
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.empty(1, 2, 7, device="cuda")


def seen(monkeypatch, backend="triton", operator="row_entropy", **changes):
    entry = {"passed": True, "faster_than_next": True, "next": "reference", **changes}
    monkeypatch.setattr(verified, "ARCHITECTURES", {"sm_1": {operator: {backend: entry}}})


def test_the_reference_on_a_gpu_warns_once(on_gpu):
    with pytest.warns(UserWarning, match="runs on the plain torch reference.*no GPU backend can run this call"):
        assert backends.resolve("row_entropy", {"reference": len}, (on_gpu,)) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.resolve("row_entropy", {"reference": len}, (on_gpu,))
        backends.resolve("row_entropy", {"reference": len}, (on_gpu,), "reference")


def test_a_kernel_runs_unnamed_only_where_it_is_verified(on_gpu, monkeypatch):
    kernels = dict.fromkeys(("reference", "triton", "cuda"), len)
    words = "backend 'cuda' could run this call: not yet verified on sm_1; set MLOT_BACKEND=cuda to use it. backend 't"
    with pytest.warns(UserWarning, match=words):
        assert backends.resolve("row_entropy", kernels, (on_gpu,)) == "reference"
    assert backends.resolve("row_entropy", kernels, (on_gpu,), "cuda") == "cuda"
    seen(monkeypatch)
    assert backends.resolve("row_entropy", kernels, (on_gpu,)) == "triton"
    assert backends.resolve("sinkhorn", kernels, (on_gpu,)) == "reference"
    seen(monkeypatch, "cuda")
    assert backends.resolve("row_entropy", kernels, (on_gpu,)) == "cuda"
    seen(monkeypatch, faster_than_next=False)
    assert backends.resolve("row_entropy", kernels, (on_gpu,)) == "reference"


def test_a_kernel_that_cannot_run_the_call_is_not_blamed_on_verification(on_gpu):
    kernels = {"reference": len, "triton": backends.refusing(lambda *_: None, lambda *_: "too narrow")}
    with pytest.warns(UserWarning, match="no GPU backend can run this call"):
        backends.resolve("row_entropy", kernels, (on_gpu,))


@pytest.mark.usefixtures("without_cuda")
def test_explain_tells_what_is_not_chosen_from_what_cannot_run(on_gpu, monkeypatch):
    monkeypatch.setitem(OPERATORS["row_entropy"].forward, "triton", len)
    said = explain(row_entropy, on_gpu)
    assert said.chosen == "reference"
    assert said.refusals["triton"] is None
    assert said.passed_over == {"triton": "not yet verified on sm_1; set MLOT_BACKEND=triton to use it"}
    assert "  triton     can run this call; not chosen: not yet verified on sm_1; set MLOT_BACKEND" in str(said)
    assert "  cuda       not implemented for this operator" in str(said)
    named = explain(row_entropy, on_gpu, backend="triton")
    assert (named.chosen, named.passed_over) == ("triton", {})
    seen(monkeypatch)
    said = explain(row_entropy, on_gpu)
    assert (said.chosen, said.passed_over) == ("triton", {})


@pytest.mark.parametrize("verified_there", [False, True])
def test_the_choice_on_a_gpu_is_traced(on_gpu, monkeypatch, verified_there):
    monkeypatch.setitem(OPERATORS["row_entropy"].forward, "triton", len)
    if verified_there:
        seen(monkeypatch)
    chosen = []

    def compiler(graph, inputs):
        chosen.extend(node.args[-1] for node in graph.graph.nodes if "row_entropy" in str(node.target))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x: row_entropy(x), fullgraph=True, backend=compiler)
    if verified_there:
        compiled(on_gpu)
    else:
        with pytest.warns(UserWarning, match="not yet verified on sm_1"):
            compiled(on_gpu)
    assert chosen == ["triton" if verified_there else "reference"]


@pytest.mark.skipif(native.MISSING["cuda"] is None, reason="the library is here")
def test_raw_ops_name_a_missing_library():
    with pytest.raises(BackendUnavailable, match="row_entropy_forward: backend 'cuda': this torch has no CUDA"):
        torch.ops.mlot.row_entropy_forward(X[None], torch.zeros(1, 2).long(), None, None, 1.0, False, 7, "cuda")


@pytest.mark.usefixtures("without_cuda")
def test_raw_ops_name_a_missing_backend():
    with pytest.raises(BackendUnavailable, match="mlot::row_entropy_forward: no backend 'cuda'"):
        torch.ops.mlot.row_entropy_forward(X[None], torch.zeros(1, 2).long(), None, None, 1.0, False, 7, "cuda")
