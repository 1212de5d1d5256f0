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


def rebuild(target: Path, kernels: str, include: Path) -> None:
    """A library of its own, of which one file of kernels takes headers from ``include`` before the others."""
    made = _compiled(SOURCES / f"cuda/{kernels}.cu", target.with_suffix(".o"), f"-I{include}")
    _link(
        target, [made if source.stem == kernels and source.suffix == ".cu" else object for source, object in _parts()]
    )


def _parts() -> list[tuple[Path, Path]]:
    """Sources and their objects."""
    sources = sorted([*(SOURCES / "cuda").glob("*.cu"), *(SOURCES / "ops_cuda").glob("*.cpp")])
    return [(source, FOLDER / f"{source.parent.name}-{source.stem}.o") for source in sources]


def _compiled(source: Path, made: Path, *first: str) -> Path:
    command = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"]
    command += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command += ["-DMLOT_ON_HOST", *first, f"-I{SOURCES}/include", f"-I{HEADERS}"]
    command += ["-isystem", f"{_torch()}/include", "-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={STABLE}"]
    run([*command, "-c", "-x", "c++", str(source), "-o", str(made)])
    return made


def _link(target: Path, objects: Iterable[Path]) -> None:
    made = target.with_suffix(".new")
    run(
        [COMPILER, "-shared", *map(str, objects), f"-L{_torch()}/lib", "-ltorch_cpu", "-Wl,-Bsymbolic", "-o", str(made)]
    )
    made.replace(target)


def _torch() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def _build(target: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        objects = list(threads.map(lambda part: _compiled(*part), _parts()))
    _link(target, objects)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr
