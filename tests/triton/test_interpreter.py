"""The Triton kernels' values on a CPU: the contract's promises of values, in a process where Triton interprets.

Triton decides at its import whether it interprets, so that this cannot be the process of the other tests.
"""

import os
import subprocess
import sys

import pytest

from mlot_kernels.registry import OPERATORS
from tests.conftest import DEVICE, FULL

pytest.importorskip("triton", reason="the kernels are Triton's; pip install 'mlot-kernels[triton]'")

# Every program is a Python loop here, and takes milliseconds: the quick run has values alone, without float64 and many
# rows, and in 16 bits of the two cases with most in them. `make test-full` has all.
QUICK = "fidelity and not many and (float32 or ((bfloat16 or float16) and (odd or every)))"
ALL = "fidelity or gradcheck or nan_shows or not_read or determinism or batch or composes"


@pytest.mark.skipif(DEVICE == "cuda", reason="where there is a GPU, the contract's tests run the kernels on it")
@pytest.mark.parametrize("operator", [name for name, op in OPERATORS.items() if "triton" in op.forward])
def test_operators_in_the_interpreter(operator):
    promises = ALL if FULL else QUICK
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "tests/test_contract.py",
            f"-k={operator}-triton and ({promises})",
            "-pno:cacheprovider",
            "-pno:xdist",
            "--color=no",
        ],
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout, done.stdout[-500:]
    assert "skipped" not in done.stdout, done.stdout[-500:]
