"""Builds the native parts: `mlot_kernels/_cpu.so`, where there is nvcc `_cuda.so`, and for developers `_probe*.so`.

It never imports torch, whose headers are all that it needs. Where something is missing it installs the Python parts
alone and says so. The version says what was built: `+cu130`, `+cpu`, or nothing where there are the Python parts alone.
Environment variables:

    MLOT_NATIVE           0: the Python parts alone; 1: fail where the native ones cannot be built; unset: if possible
    MLOT_CUDA             0: no `_cuda.so`; 1: fail where it cannot be built; unset: if possible. It needs no GPU
    CUDA_HOME             the toolkit whose nvcc is taken, before that on PATH and that of the extra cuda-build
    TORCH_CUDA_ARCH_LIST  what it compiles for, as '9.0;12.0+PTX'; unset: what nvcc knows of sm_80, 90, 100, 120
    MLOT_PROBE            1: also build the developers' module (pybind11), which no wheel may hold
    MLOT_SANITIZE         for example address,undefined: instrument everything; see `make sanitize`
    MLOT_TORCH_DIR        torch's folder, where it is in neither the build's nor the target's environment
    MLOT_VERBOSE          1: print every command
    CXX, MAX_JOBS         the compiler, and how many of it run at once
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
sys.path.insert(0, str(SOURCES))  # a build does not start with its own folder on the path

from mlot_toolchain import SANITIZE, TARGET_VERSION, Missing, Tools, find_tools, say, switch  # noqa: E402

VERSION = "0.1.0.dev0"
PACKAGE = "mlot_kernels"
COMMIT = "COMMIT"  # a file of the source distribution, which is no checkout

BASELINE = {"baseline": ""}
INSTRUCTION_SETS = {
    "x86_64": {
        **BASELINE,
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprefer-vector-width=512",
    },
}.get(platform.machine(), BASELINE)

if SANITIZE:  # this machine's own alone, and no wheel holds it: three would take minutes to compile
    INSTRUCTION_SETS = {"baseline": "-march=native"}


def commit() -> str | None:
    """The commit that is built; None where these are neither a checkout of the project nor its source distribution."""
    if (ROOT / COMMIT).exists():
        return (ROOT / COMMIT).read_text().strip()
    if not shutil.which("git"):
        return None
    git = ("git", "-C", str(ROOT))
    ours = subprocess.run([*git, "ls-files", "--error-unmatch", "setup.py"], capture_output=True).returncode == 0
    return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() if ours else None


def write_build_facts(folder: Path) -> None:
    """`_build.json`, which `python -m mlot_kernels info` and the reasons of `explain` are made of."""
    facts = {
        "commit": commit() or None,
        "cuda": TOOLS.cuda.name if TOOLS and TOOLS.cuda else None,
        "architectures": list(INSTRUCTION_SETS) if TOOLS else [],
        "cuda_architectures": TOOLS.cuda.targets() if TOOLS and TOOLS.cuda else [],
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
            f"-ffile-prefix-map={ROOT}=.",
            f"-I{SOURCES}/include",
            *checks,
            *(["-DMLOT_ONE_INSTRUCTION_SET"] if len(INSTRUCTION_SETS) == 1 else []),
            "-MMD -MF $out.d $flags -c $in -o $out",
        ]
        link = [
            tools.compiler,
            "-shared",
            *([] if PROBE or SANITIZE else ["-s"]),  # names, which only a developer's profiler asks for
            *instrument,
            "$in -Wl,--no-as-needed $libraries -Wl,--as-needed -Wl,-Bsymbolic -o $out",
        ]
        self.rule("compile", compile_, "  depfile = $out.d", "  deps = gcc")
        self.rule("link", link)
        if tools.cuda:
            nvcc = [
                f"{tools.cuda.home}/bin/nvcc -std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
                f"-ccbin {tools.compiler}",
                *tools.cuda.options(),
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
        # Torch's checks put __FILE__ into the library, and no path of the building machine may be in it. Behind a
        # symbolic link the compiler writes the one or the other.
        paths = [f"-ffile-prefix-map={path}=torch" for path in dict.fromkeys((TOOLS.torch, TOOLS.torch.resolve()))]
        return [
            ninja.compile(source, " ".join([stable, *paths, *flags]))
            for source in sorted((SOURCES / folder).glob("*.cpp"))
        ]

    def link_cuda(self, ninja: Ninja, target: Path, dispatch: Path) -> None:
        libraries = ("libtorch_cpu.so", "libtorch_cuda.so")
        folder = ninja.folder / f"cuda-{TOOLS.cuda.name}"
        torch = tuple(ninja.edge("stand_in", folder / name, [], name=name) for name in libraries)
        kernels = [
            ninja.edge("nvcc", folder / f"{source.stem}.o", [source])
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
        # A wheel takes all that lies in the build's folder, where another variant may have left its libraries.
        shutil.rmtree(Path(self.get_finalized_command("build").build_lib) / PACKAGE, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if TOOLS else tag


class Sources(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        (Path(base_dir) / COMMIT).write_text(f"{commit() or ''}\n")


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
CUDA = TOOLS.cuda if TOOLS else None
LOCAL = f"+cu{CUDA.name.replace('.', '')}" if CUDA else "+cpu" if TOOLS else ""
extensions = ["_cpu"] * (TOOLS is not None) + ["_cuda"] * (CUDA is not None) + ["_probe"] * PROBE
setup(
    version=VERSION if "sdist" in sys.argv else VERSION + LOCAL,
    ext_modules=[Extension(f"{PACKAGE}.{name}", []) for name in extensions],
    cmdclass={"build_ext": Build, "build_py": Python, "bdist_wheel": Wheel, "sdist": Sources},
)
