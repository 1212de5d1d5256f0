"""The CUDA kernels' values without a GPU: the contract's promises, with every thread of a kernel a fiber on the CPU.

Blocks and clusters are small there, and between two barriers threads run in an order that is chosen: a result that
depends on it lacks a barrier.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlot_kernels.registry import OPERATORS
from tests.conftest import FULL
from tests.native import on_host

REASON = on_host.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

ASCENDING, DESCENDING, SHUFFLED = range(3)
SHAPES = [(64, 1, SHUFFLED), (64, 8, SHUFFLED)]  # threads of a block, blocks of a cluster, order
if FULL:  # every size of a block with every size of a cluster, every order with two sizes of either
    orders = (ASCENDING, DESCENDING, SHUFFLED, DESCENDING, SHUFFLED, ASCENDING)
    SHAPES = [(*sizes, order) for sizes, order in zip(itertools.product((32, 128), (1, 2, 8)), orders, strict=True)]

QUICK = "fidelity and not many and (float32 or ((float64 or bfloat16 or float16) and (odd or every)))"
FEW = {
    "row_divergence": "odd or every or log or interpolated or head or vocabularies or floor"
}  # of many cases, each path
ALL = "fidelity or gradcheck or nan_shows or not_read or determinism or batch or composes or opcheck"
OF_ITS_OWN = "ties or equals or tied or 16_bit or refuse"  # rows of the operators' own tests
OF_ITS_OWN = f"({OF_ITS_OWN} or cross or hard or masked)" if FULL else f"({OF_ITS_OWN}) and not (cross or gradcheck)"
OF_ITS_OWN += " and cuda and not pot"  # POT's comparisons take thousands of steps


def environment(threads, cluster, order):
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {
        "MLOT_CUDA_ON_HOST": str(on_host.build()),
        "MLOT_ON_HOST_THREADS": str(threads),
        "MLOT_ON_HOST_CLUSTER": str(cluster),
        "MLOT_ON_HOST_ORDER": str(order),
        "OMP_NUM_THREADS": "1",
    }


def run_tests(*files, chosen, environment):
    """Of the contract and of ``files``, in a process of their own: all that are chosen pass, and none is skipped."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "tests/test_contract.py",
            *files,
            f"-k={chosen}",
            "-pno:cacheprovider",
            "-pno:xdist",
            "--color=no",
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout, done.stdout[-500:]
    assert "skipped" not in done.stdout, done.stdout[-500:]


@pytest.mark.parametrize(("threads", "cluster", "order"), SHAPES)
@pytest.mark.parametrize("operator", [name for name, op in OPERATORS.items() if "cuda" in op.forward])
def test_operators_on_the_host(operator, threads, cluster, order):
    chosen = ALL if FULL else QUICK if cluster == 1 else f"{QUICK} and not float64"
    if operator in FEW and not FULL:
        chosen += f" and ({FEW[operator]})"
    own = map(str, sorted(on_host.ROOT.glob(f"tests/ops/test_{operator}*.py")))
    run_tests(
        *own,
        chosen=f"({operator}-cuda and ({chosen})) or ({OF_ITS_OWN} and ({operator}-cuda or not test_contract))",
        environment=environment(threads, cluster, order),
    )


@pytest.mark.parametrize(("threads", "cluster", "order"), SHAPES[:1] + SHAPES[-1:])
def test_rows_in_few_bins_on_the_host(threads, cluster, order):
    """The contract's short rows, which sorted_l1 sorts elsewhere, and what is hard for bins."""
    run_tests(
        "tests/ops/test_sorted_l1_binned.py",
        chosen=f"(sorted_l1-cuda and ({QUICK} or nan_shows)) or not test_contract",
        environment=environment(threads, cluster, order) | {"MLOT_ON_HOST_BINS": "64"},
    )


def test_losses_on_the_host():
    done = subprocess.run(
        [sys.executable, "-m", "tests.losses.on_backend", "cuda", *(["--full"] if FULL else [])],
        env=environment(64, 8, SHUFFLED),
        cwd=on_host.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases agree" in done.stdout


def test_a_kernel_without_a_barrier_fails(tmp_path):
    """Of row_entropy: between what each warp leaves in shared memory and the first warp's reading it."""
    on_host.build()
    header = Path("mlot/cuda/device.h")
    text = (on_host.SOURCES / "include" / header).read_text()
    whole = "if (lane == 0) shared[warp] = mine;\n  __syncthreads();"
    assert text.count(whole) == 1
    (tmp_path / header).parent.mkdir(parents=True)
    (tmp_path / header).write_text(text.replace(whole, whole.partition("\n")[0]))
    on_host.rebuild(tmp_path / "_cuda.so", "row_entropy", tmp_path)
    for folder, fails in ((on_host.FOLDER, False), (tmp_path, True)):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "tests/test_contract.py", "-kfidelity and row_entropy-cuda and float64"]
            + ["-x", "-pno:cacheprovider", "-pno:xdist", "--color=no"],
            env=environment(64, 1, SHUFFLED) | {"MLOT_CUDA_ON_HOST": str(folder)},
            capture_output=True,
            text=True,
        )
        assert ("FAILED" in done.stdout) == fails, done.stdout[-4000:]
        assert fails or done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize(("flags", "says"), [([], "ok"), (["-DDROP_A_BARRIER"], "WRONG")], ids=["whole", "no barrier"])
def test_a_missing_barrier_shows(flags, says, tmp_path):
    source, program = on_host.HEADERS / "cuda_on_host_example.cu", tmp_path / "example"
    on_host.run([on_host.COMPILER, "-std=c++20", "-O1", *flags, "-x", "c++", str(source), "-o", str(program)])
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout.split()[-1] == says
    assert (done.returncode == 0) == (says == "ok")
