"""What the native build needs, and where on this machine it is found. Nothing here imports torch.

setup.py takes it from here, and so do the tests and ``wheels``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 10)  # the first whose stable ABI has parallel_for and const_data_ptr
TARGET_VERSION = "0x020a000000000000"  # OLDEST_TORCH as torch's headers write it; they hide whatever is newer

OLDEST_CUDA = (12, 4)
OLDEST_ARCHITECTURE = 80
ARCHITECTURES = ("80", "90", "100", "120")  # those of them that nvcc knows, where TORCH_CUDA_ARCH_LIST is not set
FRONT_ENDS = ("80", "90")

SANITIZE = os.environ.get("MLOT_SANITIZE", "")


def say(text: str) -> None:
    print(f"[mlot] {text}", file=sys.stderr, flush=True)


def switch(name: str) -> str:
    """An environment variable that is 0, 1 or unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"[mlot] {name} must be 0, 1 or unset, got {value!r}")
    return value


@dataclass(frozen=True)
class Tools:
    """What the native build needs."""

    compiler: str
    ninja: tuple[str, ...]
    torch: Path
    torch_version: str
    cuda: Toolkit | None
    why_no_cuda: str | None


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: nvcc, what it links with, and what it is to compile for."""

    home: Path
    version: tuple[int, int]
    architectures: tuple[str, ...]  # of machine code: 80, 90a
    ptx: tuple[str, ...]  # of code that the driver compiles, for chips that come after them

    def __str__(self) -> str:
        return f"CUDA {self.name} for {', '.join(self.targets())}"

    @property
    def name(self) -> str:
        return "{}.{}".format(*self.version)

    def options(self) -> list[str]:
        """nvcc's: each of its front ends, half of a compilation, serves all architectures for which it reads alike."""
        code = [f"-gencode arch=compute_{virtual(name)},code=sm_{name}" for name in self.architectures]
        return code + [f"-gencode arch=compute_{name},code=compute_{name}" for name in self.ptx]

    def targets(self) -> list[str]:
        return [*(f"sm_{x}" for x in self.architectures), *(f"compute_{x}" for x in self.ptx)]


class Missing(Exception):
    """Something that the native build needs is not here; the message says what, and what to do."""


def find_tools() -> Tools:
    if sys.platform != "linux":
        raise Missing(f"the native parts are built on Linux alone, and this is {sys.platform}")
    torch, version = find_torch()
    compiler, ninja = find_compiler(), find_ninja()
    cuda, why_not = find_cuda()
    return Tools(compiler, ninja, torch, version, cuda, why_not)


def find_cuda() -> tuple[Toolkit | None, str | None]:
    """The toolkit, or None and why there is none."""
    wanted = switch("MLOT_CUDA")
    if wanted == "0" or SANITIZE:
        return None, "it was built with MLOT_CUDA=0" if wanted == "0" else "sanitizers watch the CPU"
    try:
        return find_toolkit(), None
    except Missing as missing:
        if wanted == "1":
            raise SystemExit(f"[mlot] MLOT_CUDA=1, and the CUDA kernels cannot be built: {missing}") from None
        return None, str(missing)


def find_toolkit() -> Toolkit:
    if home := os.environ.get("CUDA_HOME"):
        candidates = [Path(home) / "bin/nvcc"]
    else:
        installed = {Path(sysconfig.get_paths()[kind]) for kind in ("purelib", "platlib")}
        found = shutil.which("nvcc")
        candidates = [Path(found)] if found else []
        candidates += sorted(path for folder in installed for path in folder.glob("nvidia/cu*/bin/nvcc"))
    for nvcc in candidates:
        if os.access(nvcc, os.X_OK):
            return toolkit_of(nvcc)
    where = f"CUDA_HOME={home} has none" if home else "CUDA_HOME is not set and there is none on PATH"
    raise Missing(f"there is no nvcc: {where}; install a CUDA toolkit, or pip install 'mlot-kernels[cuda-build]'")


def version_of(nvcc: Path) -> tuple[int, int]:
    """As nvcc tells it; (0, 0) where it does not."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    return (int(release[1]), int(release[2])) if release else (0, 0)


def toolkit_of(nvcc: Path) -> Toolkit:
    version = version_of(nvcc)
    if version < OLDEST_CUDA:
        oldest = "{}.{}".format(*OLDEST_CUDA)
        raise Missing(f"{nvcc} is CUDA {version[0]}.{version[1]}; the kernels need {oldest} or newer")
    # What stands on PATH may be a script beside which there is no toolkit.
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    home = Path(top[1]).resolve() if top else nvcc.resolve().parents[1]
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = re.findall(r"compute_(\w+)", listed)
    return Toolkit(home, version, *architectures(known, f"{nvcc} (CUDA {version[0]}.{version[1]})"))


def architectures(known: list[str], nvcc: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to compile for, machine code and PTX: what TORCH_CUDA_ARCH_LIST names, else all of ours that nvcc knows."""
    wanted = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if wanted == [""]:
        ours = tuple(name for name in ARCHITECTURES if name in known)
        return ours, tuple(virtual(name) for name in ours[-1:])
    code, ptx = [], []
    for item in wanted:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not found:
            raise Missing(f"TORCH_CUDA_ARCH_LIST: {item!r} is no architecture; write them as '8.0;9.0;12.0+PTX'")
        number, name = int(found[1] + found[2]), found[1] + found[2] + found[3]
        if number < OLDEST_ARCHITECTURE:
            say(f"TORCH_CUDA_ARCH_LIST: {item} is left out; the kernels need sm_{OLDEST_ARCHITECTURE} or newer")
        elif str(number) not in known:
            knows = ", ".join(f"sm_{x}" for x in known)
            raise Missing(
                f"TORCH_CUDA_ARCH_LIST asks for {item}, which {nvcc} does not know, only {knows}; "
                "leave it out or take a newer toolkit"
            )
        else:
            code.append(name)
            ptx += [name] if found[4] else []
    if not code:
        raise Missing(f"TORCH_CUDA_ARCH_LIST names nothing from sm_{OLDEST_ARCHITECTURE} on; add one, or unset it")
    return tuple(code), tuple(ptx)


def virtual(architecture: str) -> str:
    """What nvcc's front end reads the kernels for: they tell chips without clusters of blocks from those with."""
    if not architecture.isdigit():
        return architecture  # 90a is no other's
    return max((x for x in FRONT_ENDS if int(x) <= int(architecture)), key=int)


def find_compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise Missing(f"there is no C++ compiler, {' or '.join(names)}; install g++ 11 or newer, or set CXX")


def find_ninja() -> tuple[str, ...]:
    if found := shutil.which("ninja"):
        return (found,)
    if importlib.util.find_spec("ninja"):
        return (sys.executable, "-m", "ninja")
    raise Missing("there is no ninja; pip install ninja")


def find_torch() -> tuple[Path, str]:
    """Torch's folder and version: while pip isolates the build, those of the environment that it installs into."""
    for folder in torch_folders():
        if not (folder / "version.py").exists():
            continue
        version = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())[1]
        if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
            raise Missing(f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}; install a newer one")
        if not (folder / "include/torch/csrc/stable/library.h").exists():
            raise Missing(f"torch {version} in {folder} has no headers; install it from a wheel of the project")
        return folder, version
    raise Missing("there is no torch in this environment; install it first, then mlot-kernels again")


def torch_folders() -> Iterator[Path]:
    if named := os.environ.get("MLOT_TORCH_DIR"):
        yield Path(named)
        return
    spec = importlib.util.find_spec("torch")  # finds it without importing it
    if spec and spec.origin:
        yield Path(spec.origin).parent
    for kind in ("purelib", "platlib"):
        yield Path(sysconfig.get_paths()[kind]) / "torch"
