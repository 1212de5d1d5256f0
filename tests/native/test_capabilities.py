"""``MLOT_CPU_CAPABILITY`` names the instruction set. It is read once, hence a process for each value."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

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


def native_operators() -> list[str]:
    """A few, or all under MLOT_TEST_FULL."""
    names = [name for name, operator in OPERATORS.items() if "cpu" in operator.forward]
    return names if FULL else [name for name in names if name in ("row_entropy", "topk_softmax")]


def run(*arguments: str, capability: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MLOT_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "2"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "capability",
    [
        "default",
        pytest.param("avx2", marks=pytest.mark.skipif(not AVX2, reason="this machine has no AVX2")),
        pytest.param("avx512", marks=pytest.mark.skipif(not AVX512, reason="this machine has no AVX-512")),
    ],
)
def test_every_instruction_set_passes_the_selftest(capability):
    arguments = ("--device", "cpu", "--backend", "cpu", "--op", *native_operators())
    done = run("-m", "mlot_kernels", "selftest", *arguments, capability=capability)
    assert done.returncode == 0, done.stdout + done.stderr
    probe = run("-c", "from mlot_kernels import _probe; print(_probe.capability)", capability=capability)
    assert probe.stdout.strip() in (capability, ""), probe.stderr  # "": there is no probe


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
