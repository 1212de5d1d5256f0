"""``MLOT_CPU_CAPABILITY`` names the instruction set. It is read once, hence a process for each value."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlot_kernels.registry import OPERATORS
from tests.conftest import FULL

X86 = platform.machine() == "x86_64"
AVX2 = X86 and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
AVX512 = X86 and torch.backends.cpu.get_cpu_capability() == "AVX512"

ENTROPY = """
import torch, mlot_kernels
print(mlot_kernels.row_entropy(torch.randn(2, 3, 5), backend="cpu").shape)
"""


SWEEPS = ["key_histogram", "pairwise", "probability_bins", "run_length", "sorted_l1_steps"]
SWEEPS += ["scalar", "select"] if FULL else []  # a minute and more


def native_operators() -> list[str]:
    """A few, or all under MLOT_TEST_FULL."""
    names = [name for name, operator in OPERATORS.items() if "cpu" in operator.forward]
    return names if FULL else [name for name in names if name in ("row_entropy", "topk_softmax")]


def run(*arguments: str, capability: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MLOT_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


each_capability = pytest.mark.parametrize(
    "capability",
    [
        "default",
        pytest.param("avx2", marks=pytest.mark.skipif(not AVX2, reason="this machine has no AVX2")),
        pytest.param("avx512", marks=pytest.mark.skipif(not AVX512, reason="this machine has no AVX-512")),
    ],
)


@each_capability
def test_every_instruction_set_passes_the_selftest(capability):
    arguments = ("--device", "cpu", "--backend", "cpu", "--op", *native_operators())
    done = run("-m", "mlot_kernels", "selftest", *arguments, capability=capability)
    assert done.returncode == 0, done.stdout + done.stderr
    probe = run("-c", "from mlot_kernels import _probe; print(_probe.capability)", capability=capability)
    assert probe.stdout.strip() in (capability, ""), probe.stderr  # "": there is no probe


@each_capability
def test_every_instruction_set_passes_the_sweeps(capability):
    """Which other tests here run in the best one alone."""
    probe = pytest.importorskip("mlot_kernels._probe", reason="built with MLOT_PROBE=1 alone")
    if probe.capability == capability:
        pytest.skip("it is the one of this process, whose tests these are")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in SWEEPS]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, capability=capability)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("capability", ["avx", "AVX2", "baseline"])
def test_another_name_is_an_error(capability):
    done = run("-c", ENTROPY, capability=capability)
    assert done.returncode != 0
    assert f"MLOT_CPU_CAPABILITY must be default, avx2 or avx512, got '{capability}'" in done.stderr


@pytest.mark.skipif(AVX512, reason="this machine has everything")
def test_an_instruction_set_that_is_not_here_is_an_error():
    done = run("-c", ENTROPY, capability="avx512")
    assert done.returncode != 0
    assert "MLOT_CPU_CAPABILITY=avx512: this machine does not have it; unset it" in done.stderr
