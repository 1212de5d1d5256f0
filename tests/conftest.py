"""What every test runs under."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator, Iterator

import pytest
import torch

from mlot_kernels import native
from mlot_kernels.registry import OPERATORS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = os.environ.get("MLOT_TEST_FULL") == "1"
INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # as in the process that tests/triton/test_interpreter.py starts
of_triton = pytest.mark.skipif(
    not INTERPRETED, reason="Triton's alone: tests/triton/test_interpreter.py runs it where Triton interprets"
)
CUDA_ON_HOST = "MLOT_CUDA_ON_HOST" in os.environ  # as in the processes of tests/native/test_cuda_on_host.py
HAS_SCIPY = importlib.util.find_spec("scipy") is not None

if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: more threads would only wait for one another
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(autouse=True)
def poison_and_seed() -> Iterator[None]:
    """Memory that nobody wrote holds NaN, so that reading it shows; and every test starts from the same seed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """Where SciPy is not installed, what needs it for ``method="optimal"`` is skipped, and says so."""
    try:
        return (yield)
    except ImportError as error:
        if HAS_SCIPY or "needs SciPy" not in str(error):
            raise
        pytest.skip(str(error))


def backends_of(operator: str) -> list[str]:
    """Those that take tensors of the CPU in this process; for the tests of an operator's own."""
    there = {
        "reference": True,
        "cpu": native.MISSING["cpu"] is None,
        "triton": INTERPRETED,
        "cuda": CUDA_ON_HOST,
    }
    return [name for name in OPERATORS[operator].forward if there.get(name)]


@pytest.fixture
def device() -> str:
    return DEVICE
