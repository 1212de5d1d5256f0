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
from typing import NamedTuple

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
LIBRARY = ROOT / "mlot_kernels/_cuda.so"


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


class Usage(NamedTuple):
    registers: int
    stack: int  # what is spilled lies there, too
    shared: int


def usage(binary: Path, architecture: str) -> dict[str, Usage]:
    """What each kernel takes, by the kernel's name; empty where the binary has none for this architecture."""
    triton = pytest.importorskip("triton", reason="cuobjdump, which reads what a kernel takes, is Triton's")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = on_host.run([str(tool), "-res-usage", "-arch", f"sm_{architecture}", str(binary)])
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", said)
    return {name: Usage(*map(int, numbers)) for name, *numbers in found}


@functools.cache
def usage_in_the_library(architecture: str) -> dict[str, Usage]:
    """The same of the built library; empty where it is older than its sources."""
    sources = [path for kind in ("cu", "h") for path in (ROOT / "csrc").rglob(f"*.{kind}")]
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        return {}
    return usage(LIBRARY, architecture)


def source_of(kernel: str) -> str | None:
    """The stem of the file in whose namespace the kernel is."""
    found = re.match(r"_ZN4mlot4cuda\d+(\w+?)_kernels", kernel)
    return found and found[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels_keep_their_budget(source, architecture, nvcc, tmp_path):
    built = usage_in_the_library(architecture)
    kernels = {name: taken for name, taken in built.items() if source_of(name) == source.stem}
    assert {source_of(name) for name in built} <= {path.stem for path in KERNELS}, "a kernel of no source"
    if not built:
        cubin = tmp_path / "kernels.cubin"
        virtual = build.mlot_toolchain.virtual(architecture)
        target = f"-gencode=arch=compute_{virtual},code=sm_{architecture}"
        on_host.run(
            [str(nvcc), "-std=c++17", "-O3", target, f"-I{ROOT}/csrc/include", "-cubin", str(source), "-o", str(cubin)]
        )
        kernels = usage(cubin, architecture)
    assert kernels
    for name, taken in kernels.items():
        print(f"sm_{architecture} {name}: {taken.registers} registers, {taken.shared} bytes of shared memory")
        assert taken.stack == 0, name
        assert taken.registers <= REGISTERS, name
        assert taken.shared <= SHARED_BYTES, name


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
    if not LIBRARY.exists():
        assert os.environ.get("MLOT_TEST_CUDA") != "1", f"{LIBRARY} was not built"
        pytest.skip("this installation has no _cuda.so; install mlot-kernels with MLOT_CUDA=1")
    assert list(check.problems_of_library(LIBRARY, "cuda")) == []


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
