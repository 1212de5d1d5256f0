import json
import types

import pytest
import torch

from mlot_kernels import verified
from mlot_kernels.backends import BACKENDS
from mlot_kernels.registry import OPERATORS

GPU = torch.device("cuda", 3)
GOOD = {"passed": True, "faster_than_next": True, "next": "reference"}


@pytest.fixture
def sm_1(monkeypatch):
    monkeypatch.setattr(verified, "_architectures", {3: "sm_1"})


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (None, "not yet verified on sm_1"),
        ({**GOOD, "passed": False}, "failed its checks on sm_1"),
        ({**GOOD, "faster_than_next": None}, "not yet measured on sm_1"),
        ({**GOOD, "faster_than_next": False}, "slower than reference on sm_1 when last measured"),
        (GOOD, None),
    ],
)
def test_what_was_seen_decides(sm_1, monkeypatch, seen, words):
    table = {} if seen is None else {"sm_1": {"sinkhorn": {"triton": seen}}}
    monkeypatch.setattr(verified, "ARCHITECTURES", table)
    expected = words and f"{words}; set MLOT_BACKEND=triton to use it"
    assert verified.reason("sinkhorn", "triton", GPU) == expected


def test_it_is_seen_for_one_operator_one_backend_and_one_architecture(sm_1, monkeypatch):
    monkeypatch.setattr(verified, "ARCHITECTURES", {"sm_1": {"sinkhorn": {"triton": GOOD}}})
    assert verified.reason("sinkhorn", "triton", GPU) is None
    assert "not yet verified on sm_1" in verified.reason("sorted_l1", "triton", GPU)
    assert "not yet verified on sm_1" in verified.reason("sinkhorn", "cuda", GPU)
    monkeypatch.setattr(verified, "_architectures", {3: "sm_2"})
    assert "not yet verified on sm_2" in verified.reason("sinkhorn", "triton", GPU)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_no_gpu_kernel_needs_no_verification(sm_1, backend):
    assert verified.reason("sinkhorn", backend, GPU) is None


def test_the_interpreter_needs_no_verification():
    assert verified.reason("sinkhorn", "triton", torch.device("cpu")) is None


def test_the_device_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(verified, "_architectures", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (9, index))
    assert [verified.architecture(i) for i in (0, 0, 1, 0)] == ["sm_90", "sm_90", "sm_91", "sm_90"]
    assert asked == [0, 1]


def test_rocm_names_its_architecture(monkeypatch):
    properties = types.SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(verified, "_architectures", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert verified.architecture(0) == "gfx942"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask")
def test_a_gpu_that_is_not_there_has_no_verified_kernel(monkeypatch):
    monkeypatch.setattr(verified, "_architectures", {})
    words = "not yet verified on a GPU that is not here; set MLOT_BACKEND=cuda to use it"
    assert verified.reason("sinkhorn", "cuda", GPU) == words


def test_the_table_that_ships_is_whole():
    table = json.loads(verified.PATH.read_text())
    assert table["format"] == 1
    assert table["architectures"] == verified.ARCHITECTURES
    for architecture, operators in verified.ARCHITECTURES.items():
        assert architecture.startswith(("sm_", "gfx"))
        for operator, entries in operators.items():
            assert set(entries) <= set(OPERATORS[operator].forward) & set(verified.NEEDED)
            for backend, seen in entries.items():
                assert seen["next"] in set(BACKENDS) - {backend}
                assert {"passed", "faster_than_next", "torch", "triton", "commit", "date"} <= seen.keys()
