"""What nvcc makes of the CUDA kernels, without a GPU: registers, spills and shared memory, and what the library needs.

nvcc comes from CUDA_HOME, PATH or the extra cuda-build. Without it these tests are skipped; with MLOT_TEST_CUDA=1 they
fail instead.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import FULL
from tests.native import on_host
from wheels import build, check

ROOT = on_host.ROOT
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ["90"] + ["80", "100", "120"] * FULL
REGISTERS = 128
SHARED_BYTES = 48 << 10  # static: kernels take theirs at the launch


@functools.cache
def toolkit():
    """As setup.py finds it."""
    if not (ROOT / "setup.py").exists():
        return None, "these are no sources that can be built"
    code = "import mlot_toolchain; print(mlot_toolchain.find_toolkit().home)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "csrc", capture_output=True, text=True)
    if done.returncode == 0:
        return Path(done.stdout.split()[-1]), None
    return None, done.stderr.strip().splitlines()[-1].removeprefix("mlot_toolchain.Missing: ")


@pytest.fixture
def nvcc():
    home, reason = toolkit()
    if home is None:
        assert os.environ.get("MLOT_TEST_CUDA") != "1", reason
        pytest.skip(reason)
    return home / "bin/nvcc"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels_keep_their_budget(source, architecture, nvcc, tmp_path):
    command = [
        str(nvcc),
        "-std=c++17",
        "-O3",
        f"-gencode=arch=compute_{build.mlot_toolchain.virtual(architecture)},code=sm_{architecture}",
        f"-I{ROOT}/csrc/include",
        "-Xptxas=-v",
        "-cubin",
    ]
    said = on_host.run([*command, str(source), "-o", str(tmp_path / "kernels.cubin")])
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        said,
        re.DOTALL,
    )
    assert len(kernels) == said.count("Compiling entry function") > 0
    for name, stack, stores, loads, registers, rest in kernels:
        shared = sum(int(size) for size in re.findall(r"(\d+) bytes smem", rest))
        print(f"sm_{architecture} {name}: {registers} registers, {shared} bytes of shared memory")
        assert stack == stores == loads == "0", name
        assert int(registers) <= REGISTERS, name
        assert shared <= SHARED_BYTES, name


def test_what_measures_the_barriers_compiles_and_says_why_it_cannot_run(nvcc, tmp_path):
    program = tmp_path / "cluster_barrier"
    source = ROOT / "bench/cluster_barrier.cu"
    on_host.run(
        [str(nvcc), "-std=c++17", "-O3", "-arch=sm_90", f"-I{ROOT}/csrc/include", str(source), "-o", str(program)]
    )
    if torch.cuda.is_available():
        pytest.skip("here it runs: make gpu-check")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.match("cuda[A-Z]", done.stderr), done.stderr


def test_the_library_needs_torchs_stable_abi_alone():
    library = ROOT / "mlot_kernels/_cuda.so"
    if not library.exists():
        assert os.environ.get("MLOT_TEST_CUDA") != "1", f"{library} was not built"
        pytest.skip("this installation has no _cuda.so; install mlot-kernels with MLOT_CUDA=1")
    assert list(check.problems_of_library(library, "cuda")) == []


def test_the_library_is_not_loaded_where_torch_has_no_cuda():
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    code = (
        "import mlot_kernels.native as n; assert 'this torch has no CUDA' in n.MISSING['cuda'], n.MISSING; "
        "assert '_cuda.so' not in open('/proc/self/maps').read()"
    )
    inherited = {name: value for name, value in os.environ.items() if name != "MLOT_CUDA_ON_HOST"}
    done = subprocess.run([sys.executable, "-c", code], env=inherited, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
