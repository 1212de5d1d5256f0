"""``python -m wheels.build [--cuda VERSION ...]``: wheels, one folder of ``dist`` for each variant.

A variant is a CUDA version such as 13.0, ``none`` (the CPU kernels alone) or ``python`` (no native library). A toolkit
in CUDA_HOME is used for its own version; without one, nvcc and what it needs are fetched from the package index, which
has them from CUDA 13.0 on. Files bear the commit's time and libraries no path of the machine, so that a wheel which is
built twice from one commit is the same.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlot_toolchain

ROOT = Path(__file__).resolve().parents[1]
BUILDS = ROOT / "build"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
MATRIX = ("python", "none", "13.0", "13.2")
FIRST_IN_THE_INDEX = (13, 0)  # of 12.x it has ptxas and libraries, but no nvcc


def folder_of(cuda: str) -> str:
    """``cu130``, ``cpu`` or ``python``: a mixed folder would give everyone the highest CUDA version."""
    return {"none": "cpu", "python": "python"}.get(cuda, f"cu{cuda.replace('.', '')}")


def release_of(cuda: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)\.(\d+)", cuda)
    if not found:
        raise SystemExit(f"CUDA={cuda}: give a version such as 13.0, none (no CUDA) or python (nothing native)")
    return int(found[1]), int(found[2])


def packages(cuda: str) -> list[str]:
    """nvcc and its companions, each of this version: left to themselves they come in the newest one, which nvcc is not.

    The C++ library's headers have versions of their own from 13.3 on; any that is not newer serves.
    """
    major, minor = release_of(cuda)
    companions = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-nvvm")
    return [*(f"{name}=={cuda}.*" for name in companions), f"nvidia-cuda-cccl>={major}.0,<{major}.{minor + 1}"]


def toolkit(cuda: str, environment: Mapping[str, str] = os.environ) -> Path:
    """The folder that is to be CUDA_HOME: the one that is set, or one that is fetched."""
    release = release_of(cuda)
    if home := environment.get("CUDA_HOME"):
        nvcc = Path(home) / "bin/nvcc"
        if not nvcc.exists():
            raise SystemExit(f"CUDA_HOME={home} has no bin/nvcc; name a CUDA {cuda} toolkit, or unset it")
        found = mlot_toolchain.version_of(nvcc)
        if found != release:
            told = "{}.{}".format(*found) if any(found) else "of no version that it tells"
            raise SystemExit(f"CUDA={cuda}, and CUDA_HOME={home} is {told}; name a CUDA {cuda} toolkit, or unset it")
        return Path(home)
    if release < FIRST_IN_THE_INDEX:
        raise SystemExit(
            f"CUDA={cuda}: the package index has no nvcc before CUDA {'{}.{}'.format(*FIRST_IN_THE_INDEX)}. Set "
            f"CUDA_HOME to an installed CUDA {cuda} toolkit, or build in a container: docs/releasing.md has the recipe"
        )
    target = BUILDS / "toolkits" / cuda
    if not (target / "complete").exists():
        command = [*PIP, "install", "-q", "--no-deps", "--upgrade", "--target", str(target)]
        if subprocess.run([*command, *packages(cuda)]).returncode:
            raise SystemExit(f"CUDA={cuda}: the package index has no such nvcc; set CUDA_HOME to an installed toolkit")
        (target / "complete").touch()
    return target / f"nvidia/cu{release[0]}"


def variables(cuda: str) -> dict[str, str]:
    """The environment variables that make setup.py build this variant or fail."""
    if cuda == "python":
        return {"MLOT_NATIVE": "0"}
    if cuda == "none":
        return {"MLOT_NATIVE": "1", "MLOT_CUDA": "0"}
    return {"MLOT_NATIVE": "1", "MLOT_CUDA": "1", "CUDA_HOME": str(toolkit(cuda))}


def time_of_the_commit() -> str:
    """The time of all files in a reproducible wheel; where there is no git, the first that a zip file can hold."""
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "315532800"


def build(cuda: str, dist: Path, source: Path = ROOT) -> Path:
    """Builds one variant from a tree or a source distribution into its folder of ``dist``. Returns the wheel."""
    kept = ("MLOT_TORCH_DIR", "MLOT_VERBOSE")
    inherited = {name: x for name, x in os.environ.items() if not name.startswith("MLOT_") or name in kept}
    environment = {"SOURCE_DATE_EPOCH": time_of_the_commit()} | inherited | variables(cuda)
    target = dist / folder_of(cuda)
    os.umask(0o022)  # a zip file holds the files' permissions
    loud = "-v" if environment.get("MLOT_VERBOSE") == "1" else "-q"
    command = [*PIP, "wheel", loud, "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), str(source)]
    BUILDS.mkdir(exist_ok=True)
    with open(BUILDS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # all builds of a tree share its folder for what goes into a wheel
        for wheel in target.glob("*.whl"):
            wheel.unlink()
        done = subprocess.run(command, env=environment)
    if done.returncode:
        raise SystemExit(f"CUDA={cuda}: the wheel was not built; MLOT_VERBOSE=1 prints every command")
    (wheel,) = target.glob("*.whl")
    return wheel


def facts(wheel: Path) -> dict[str, object]:
    """Its ``_build.json``."""
    with zipfile.ZipFile(wheel) as archive:
        return dict(json.loads(archive.read("mlot_kernels/_build.json")))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m wheels.build", description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", nargs="+", default=MATRIX, help=f"variants; by default {' '.join(MATRIX)}")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where their folders are; by default dist")
    parser.add_argument("--source", type=Path, default=ROOT, help="a tree or an sdist; by default this one")
    chosen = parser.parse_args(arguments)
    from rich.console import Console  # for the tables alone
    from rich.table import Table

    console = Console()
    table = Table("variant", "wheel", "architectures", "size", "time")
    for cuda in chosen.cuda:
        began = time.monotonic()
        with console.status(f"{folder_of(cuda)}: building"):
            wheel = build(cuda, chosen.dist, chosen.source)
        found = facts(wheel)
        built = [*found["architectures"], *found["cuda_architectures"]]
        size, seconds = f"{wheel.stat().st_size / 2**20:.2f} MiB", f"{time.monotonic() - began:.0f} s"
        console.print(f"{folder_of(cuda)}: {wheel.name}, {size}, {seconds}")
        table.add_row(folder_of(cuda), wheel.name, " ".join(built) or "none", size, seconds)
    console.print(table)


if __name__ == "__main__":
    main()
