"""Builds the native parts: `mlot_kernels/_cpu.so`, where there is nvcc `_cuda.so`, and for developers `_probe*.so`.

It never imports torch, whose headers are all that it needs. Where something is missing it installs the Python parts
alone and says so. Environment variables:

    MLOT_NATIVE     0: the Python parts alone; 1: fail where the native parts cannot be built; unset: if possible
    MLOT_CUDA       0: no `_cuda.so`; 1: fail where it cannot be built; unset: if possible. It needs no GPU
    CUDA_HOME       the toolkit whose nvcc is taken, before that on PATH and that of the extra cuda-build
    MLOT_PROBE      1: also build the developers' module (pybind11), which no wheel may hold
    MLOT_SANITIZE   for example address,undefined: instrument everything; see `make sanitize`
    MLOT_TORCH_DIR  torch's folder, where it is in neither the build's nor the target's environment
    MLOT_VERBOSE    1: print every command
    CXX, MAX_JOBS   the compiler, and how many of it run at once
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
PACKAGE = "mlot_kernels"
OLDEST_TORCH = (2, 10)  # the first whose stable ABI has parallel_for and const_data_ptr
TARGET_VERSION = "0x020a000000000000"  # OLDEST_TORCH as torch's headers write it; they hide whatever is newer

BASELINE = {"baseline": ""}
INSTRUCTION_SETS = {
    "x86_64": {
        **BASELINE,
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512",
    },
}.get(platform.machine(), BASELINE)

CUDA_ARCHITECTURES = {(12, 8): ("80", "90", "100"), (13, 0): ("80", "90", "100", "120")}  # from this nvcc on

SANITIZE = os.environ.get("MLOT_SANITIZE", "")
if SANITIZE:  # this machine's own alone, and no wheel holds it: three would take minutes to compile
    INSTRUCTION_SETS = {"baseline": "-march=native"}


def say(text: str) -> None:
    print(f"[mlot] {text}", file=sys.stderr, flush=True)


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
    """A CUDA toolkit: nvcc and what it links with."""

    home: Path
    version: tuple[int, int]
    architectures: tuple[str, ...]

    def __str__(self) -> str:
        return f"CUDA {self.version[0]}.{self.version[1]} for {', '.join(f'sm_{x}' for x in self.architectures)}"


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


def toolkit_of(nvcc: Path) -> Toolkit:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    version = (int(release[1]), int(release[2])) if release else (0, 0)
    architectures = [names for oldest, names in CUDA_ARCHITECTURES.items() if version >= oldest]
    if not architectures:
        raise Missing(f"{nvcc} is CUDA {version[0]}.{version[1]}; the kernels need 12.8 or newer")
    # What stands on PATH may be a script beside which there is no toolkit.
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    home = Path(top[1]).resolve() if top else nvcc.resolve().parents[1]
    return Toolkit(home, version, architectures[-1])


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


def commit() -> str | None:
    """The commit that is built; None where this is no checkout of the project."""
    if not shutil.which("git"):
        return None
    git = ("git", "-C", str(ROOT))
    ours = subprocess.run([*git, "ls-files", "--error-unmatch", "setup.py"], capture_output=True).returncode == 0
    return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() if ours else None


def write_build_facts(folder: Path) -> None:
    """`_build.json`, which `python -m mlot_kernels info` and the reasons of `explain` are made of."""
    facts = {
        "commit": commit() or None,
        "cuda": "{}.{}".format(*TOOLS.cuda.version) if TOOLS and TOOLS.cuda else None,
        "architectures": list(INSTRUCTION_SETS) if TOOLS else [],
        "cuda_architectures": [f"sm_{name}" for name in TOOLS.cuda.architectures] if TOOLS and TOOLS.cuda else [],
        "torch": TOOLS.torch_version if TOOLS else None,
    }
    if not TOOLS:
        facts["missing"] = WHY_NOT
    elif not TOOLS.cuda:
        facts["missing_cuda"] = TOOLS.why_no_cuda
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")


class Ninja:
    """The text of a build.ninja file."""

    def __init__(self, tools: Tools, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        instrument = [f"-fsanitize={SANITIZE}"] if SANITIZE else []
        checks = [*instrument, "-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all"] if SANITIZE else []
        compile_ = [
            tools.compiler,
            "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra",
            # Nothing here reads errno or floating-point exceptions; without these, loops with a compare stay scalar.
            "-fno-math-errno -fno-trapping-math -fopenmp-simd",
            # A row's sums must not depend on where in memory it starts.
            "--param vect-max-peeling-for-alignment=0",
            # Torch's checks put __FILE__ into the library: no path of the building machine may be in it.
            f"-ffile-prefix-map={ROOT}=. -ffile-prefix-map={tools.torch}=torch",
            f"-I{SOURCES}/include",
            *checks,
            *(["-DMLOT_ONE_INSTRUCTION_SET"] if len(INSTRUCTION_SETS) == 1 else []),
            "-MMD -MF $out.d $flags -c $in -o $out",
        ]
        link = [
            tools.compiler,
            "-shared",
            *instrument,
            "$in -Wl,--no-as-needed $libraries -Wl,--as-needed -Wl,-Bsymbolic -o $out",
        ]
        self.rule("compile", compile_, "  depfile = $out.d", "  deps = gcc")
        self.rule("link", link)
        if tools.cuda:
            code = [f"-gencode arch=compute_{name},code=sm_{name}" for name in tools.cuda.architectures]
            newest = tools.cuda.architectures[-1]
            nvcc = [
                f"{tools.cuda.home}/bin/nvcc -std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
                f"-ccbin {tools.compiler}",
                *code,
                f"-gencode arch=compute_{newest},code=compute_{newest}",  # PTX, for what comes after them
                f"-Xcompiler=-ffile-prefix-map={ROOT}=.",
                f"-I{SOURCES}/include",
                "-MMD -MF $out.d -c $in -o $out",
            ]
            self.rule("nvcc", nvcc, "  depfile = $out.d", "  deps = gcc")
        # The result must name the library it needs, but nothing of torch is linked: an empty one stands in.
        self.rule("stand_in", [tools.compiler, "-shared -nostdlib -Wl,-soname,$name -x c /dev/null -o $out"])

    def rule(self, name: str, command: list[str], *more: str) -> None:
        self.lines += [f"rule {name}", f"  command = {' '.join(command)}", f"  description = {name} $out", *more]

    def edge(
        self, rule: str, target: Path, sources: list[Path], needs: tuple[Path, ...] = (), **variables: str
    ) -> Path:
        order = f" | {' '.join(map(str, needs))}" if needs else ""
        self.lines.append(f"build {target}: {rule} {' '.join(map(str, sources))}{order}")
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]
        return target

    def compile(self, source: Path, flags: str = "", variant: str = "") -> Path:
        part = source.relative_to(SOURCES).with_suffix(variant + ".o")
        return self.edge("compile", self.folder / part, [source], flags=flags)

    def compile_for_each_instruction_set(self, sources: list[Path]) -> list[Path]:
        """Of a template of the standard library that two objects hold, the linker keeps the first: so the oldest
        instruction set comes first, and none runs code that was compiled for a newer one."""
        return [
            self.compile(source, f"-DMLOT_ISA={name} {flags}", f".{name}")
            for name, flags in INSTRUCTION_SETS.items()
            for source in sources
        ]


class Build(build_ext):
    def get_ext_filename(self, name: str) -> str:
        # `_cpu.so` holds no Python symbol and serves every Python. Editable builds ask by the last part of the name.
        if name.split(".")[-1] == "_probe":
            return super().get_ext_filename(name)
        return os.path.join(*name.split(".")) + ".so"

    def build_extensions(self) -> None:
        # A folder that stays: an editable install's own one is a new one each time, and all would be compiled again.
        folder = ROOT / "build" / "-".join(["native", TOOLS.torch_version, *filter(None, SANITIZE.split(","))])
        folder.mkdir(parents=True, exist_ok=True)
        ninja = Ninja(TOOLS, folder)
        dispatch = ninja.compile(SOURCES / "cpu/dispatch.cpp")
        targets = [self.target(extension) for extension in self.extensions]
        links = {"_cpu": self.link_cpu, "_cuda": self.link_cuda}
        for target in targets:
            links.get(target.stem, self.link_probe)(ninja, target, dispatch)
        (folder / "build.ninja").write_text("\n".join(ninja.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        verbose = ["-v"] if os.environ.get("MLOT_VERBOSE") == "1" else []
        if subprocess.call([*TOOLS.ninja, "-C", str(folder), *jobs, *verbose, *map(str, targets)]):
            raise SystemExit("[mlot] the native build failed; MLOT_NATIVE=0 installs the Python parts alone")
        write_build_facts(targets[0].parent)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        write_build_facts(ROOT / PACKAGE)

    def target(self, extension: Extension) -> Path:
        path = Path(self.get_ext_fullpath(extension.name)).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def operators(self, ninja: Ninja, folder: str, *flags: str) -> list[Path]:
        """The objects that know torch, by its stable ABI alone."""
        stable = f"-isystem {TOOLS.torch}/include -DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION={TARGET_VERSION}"
        return [
            ninja.compile(source, " ".join([stable, *flags])) for source in sorted((SOURCES / folder).glob("*.cpp"))
        ]

    def link_cuda(self, ninja: Ninja, target: Path, dispatch: Path) -> None:
        libraries = ("libtorch_cpu.so", "libtorch_cuda.so")
        folder = ninja.folder / "cuda"
        torch = tuple(ninja.edge("stand_in", folder / name, [], name=name) for name in libraries)
        kernels = [
            ninja.edge("nvcc", ninja.folder / f"cuda/{source.stem}.o", [source])
            for source in sorted((SOURCES / "cuda").glob("*.cu"))
        ]
        objects = [*self.operators(ninja, "ops_cuda", "-DUSE_CUDA"), *kernels]
        home = TOOLS.cuda.home
        runtime = [
            f"-L{home}/{name}" for name in ("lib64", "lib", "targets/x86_64-linux/lib") if (home / name).is_dir()
        ]
        # The runtime is linked statically and hidden, so that no other version of it has to be there, or is met.
        more = [*runtime, "-Wl,--exclude-libs,ALL", "-lcudart_static -lpthread -ldl -lrt"]
        ninja.edge("link", target, objects, torch, libraries=" ".join([f"-L{folder} -ltorch_cpu -ltorch_cuda", *more]))

    def link_cpu(self, ninja: Ninja, target: Path, dispatch: Path) -> None:
        torch = ninja.edge("stand_in", ninja.folder / "libtorch_cpu.so", [], name="libtorch_cpu.so")
        operators = self.operators(ninja, "ops_cpu")
        kernels = [source for source in sorted((SOURCES / "cpu").glob("*.cpp")) if source.stem != "dispatch"]
        objects = [*operators, dispatch, *ninja.compile_for_each_instruction_set(kernels)]
        ninja.edge("link", target, objects, (torch,), libraries=f"-L{ninja.folder} -ltorch_cpu")

    def link_probe(self, ninja: Ninja, target: Path, dispatch: Path) -> None:
        try:
            import pybind11
        except ImportError:
            raise SystemExit("[mlot] MLOT_PROBE=1 needs pybind11; pip install pybind11") from None
        # Optimised, pybind11 takes most of a minute, and nothing here is worth it.
        headers = f"-O0 -isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
        module = ninja.compile(SOURCES / "probe/module.cpp", headers)
        routines = [source for source in sorted((SOURCES / "probe").glob("*.cpp")) if source.stem != "module"]
        ninja.edge("link", target, [module, dispatch, *ninja.compile_for_each_instruction_set(routines)])


class Python(build_py):
    def run(self) -> None:
        super().run()
        write_build_facts(ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE)


class Wheel(bdist_wheel):
    def run(self) -> None:
        if PROBE or SANITIZE:
            switch = "MLOT_PROBE" if PROBE else "MLOT_SANITIZE"
            raise SystemExit(f"[mlot] no wheel may hold what {switch} builds; unset it, or pip install -e")
        # A wheel takes all that lies in the build's folder, and an earlier build may have left the module there.
        for left in (Path(self.get_finalized_command("build").build_lib) / PACKAGE).glob("_probe*"):
            left.unlink()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if TOOLS else tag


def switch(name: str) -> str:
    """An environment variable that is 0, 1 or unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"[mlot] {name} must be 0, 1 or unset, got {value!r}")
    return value


def decide() -> tuple[Tools | None, str]:
    """The tools, or None and why there is no native build."""
    wanted = switch("MLOT_NATIVE")
    if wanted == "0":
        return None, "it was installed with MLOT_NATIVE=0"
    try:
        return find_tools(), ""
    except Missing as missing:
        if wanted == "1":
            raise SystemExit(f"[mlot] MLOT_NATIVE=1, and the native parts cannot be built: {missing}") from None
        return None, str(missing)


TOOLS, WHY_NOT = decide()
PROBE = TOOLS is not None and os.environ.get("MLOT_PROBE") == "1"
if TOOLS:
    say(f"native parts: torch {TOOLS.torch_version}, {TOOLS.compiler}, {', '.join(INSTRUCTION_SETS)}")
    say(f"CUDA kernels: {TOOLS.cuda or f'none, {TOOLS.why_no_cuda}'}")
else:
    say(f"the Python parts alone, which compute everything in plain torch: {WHY_NOT}")
CUDA = TOOLS is not None and TOOLS.cuda is not None
extensions = ["_cpu"] * (TOOLS is not None) + ["_cuda"] * CUDA + ["_probe"] * PROBE
setup(
    ext_modules=[Extension(f"{PACKAGE}.{name}", []) for name in extensions],
    cmdclass={"build_ext": Build, "build_py": Python, "bdist_wheel": Wheel},
)
