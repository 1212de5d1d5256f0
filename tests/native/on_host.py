"""Builds `_cuda.so` for the CPU: the CUDA kernels, unchanged, with cuda_on_host.h in the place of CUDA."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
HEADERS = Path(__file__).parent
FOLDER = ROOT / "build/cuda-on-host"
COMPILER = shutil.which("g++")
STABLE = "0x020a000000000000"  # as in csrc/mlot_toolchain.py


def why_not() -> str | None:
    """Why the kernels cannot be built here, in words; None where they can."""
    if COMPILER is None:
        return "there is no g++, which compiles the CUDA kernels for the CPU"
    return None if SOURCES.exists() else "these are no sources that can be built"


def build() -> Path:
    """The folder that holds the library, built anew if a source of it has changed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    target = FOLDER / "_cuda.so"
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes test at once
        if not target.exists() or target.stat().st_mtime < newest(_sources()):
            _build(target)
    return FOLDER


def newest(paths: Iterable[Path]) -> float:
    return max(path.stat().st_mtime for path in paths)


def _sources() -> list[Path]:
    folders = (SOURCES / "cuda", SOURCES / "ops_cuda", SOURCES / "include")
    return [
        Path(__file__),
        HEADERS / "cuda_on_host.h",
        *(path for f in folders for path in f.rglob("*") if path.is_file()),
    ]


def _build(target: Path) -> None:
    torch = Path(importlib.util.find_spec("torch").origin).parent
    command = [
        COMPILER,
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
    ]
    command += ["-DMLOT_ON_HOST", f"-I{SOURCES}/include", f"-I{HEADERS}"]
    command += ["-isystem", f"{torch}/include", "-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={STABLE}"]

    def compiled(source: Path) -> str:
        made = FOLDER / f"{source.parent.name}-{source.stem}.o"
        run([*command, "-c", "-x", "c++", str(source), "-o", str(made)])
        return str(made)

    sources = [*(SOURCES / "cuda").glob("*.cu"), *(SOURCES / "ops_cuda").glob("*.cpp")]
    with ThreadPoolExecutor(2) as threads:
        objects = list(threads.map(compiled, sorted(sources)))
    made = target.with_suffix(".new")
    run([COMPILER, "-shared", *objects, f"-L{torch}/lib", "-ltorch_cpu", "-Wl,-Bsymbolic", "-o", str(made)])
    made.replace(target)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr
