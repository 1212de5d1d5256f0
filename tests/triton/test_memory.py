"""What the Triton backend allocates: its launches are left out, since the interpreter copies what a launch is given."""

import pytest
import torch

pytest.importorskip("triton", reason="it replaces Triton's launch; pip install 'mlot-kernels[triton]'")

from triton.runtime.jit import JITFunction

from mlot_kernels.registry import OPERATORS
from tests import contract


def bounded(operator):
    return [case for case in contract.cases_of(operator, torch.float32, "cpu") if case.memory is not None]


@pytest.mark.parametrize(
    "operator", [op for op in OPERATORS.values() if "triton" in op.forward and bounded(op)], ids=lambda op: op.name
)
def test_memory(operator, monkeypatch):
    launched = []
    monkeypatch.setattr("mlot_kernels.backends._INTERPRETED", True)  # lets the backend take tensors of the CPU
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: launched.append(self))
    for case in bounded(operator):
        contract.memory(operator, case, "triton")
    assert launched
