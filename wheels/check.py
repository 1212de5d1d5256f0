"""``python -m wheels.check [WHEEL ...]``: what wheels hold and need, and whether they work in a clean environment.

Without arguments, all of ``dist``. The lists that a wheel is held against lie in ``allowed.json``; ``wheels.abi`` makes
the one of torch's symbols.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from wheels.build import PIP, ROOT, facts

ALLOWED = json.loads((Path(__file__).parent / "allowed.json").read_text())
TORCH = "2.13.0"  # what the clean environment holds
BORROWED = "borrowed"  # instead: the torch of this environment, without a minute of installing
LIBRARIES = {"python": set(), "cpu": {"_cpu.so"}, "cuda": {"_cpu.so", "_cuda.so"}}
DATA = {"py.typed", "_build.json", "triton_tiles.json", "verified.json"}


def run(*command: str | Path, **more: object) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, **more)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def problems(wheel: Path) -> Iterator[str]:
    """Whatever is wrong with the file; nothing where all is well."""
    found = re.fullmatch(r"mlot_kernels-([\w.]+?)(?:\+(\w+))?-(\w+-\w+-\w+)\.whl", wheel.name)
    if not found:
        yield "its name is not that of a wheel of mlot_kernels"
        return
    variant = found[2] or "python"
    tag = "py3-none-any" if variant == "python" else "py3-none-linux_x86_64"
    if found[3] != tag:
        yield f"it is tagged {found[3]}, not {tag}"
    limit = ALLOWED["mebibytes"]["python" if variant == "python" else "native"]
    if wheel.stat().st_size > limit * 2**20:
        yield f"it has {wheel.stat().st_size / 2**20:.1f} MiB, more than {limit}"
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = set(archive.namelist())
        yield from problems_of_content(names, variant)
        for name in sorted(x for x in names if Path(x).name in LIBRARIES["cuda"]):
            library = Path(archive.extract(name, folder))
            for problem in problems_of_library(library, library.stem.lstrip("_")):
                yield f"{library.name}: {problem}"
            if library.name == "_cuda.so":
                built = architectures(library)
                if built != set(facts(wheel)["cuda_architectures"]):
                    yield f"_cuda.so: it holds code for {', '.join(sorted(built))}; _build.json says another"


def problems_of_content(names: set[str], variant: str) -> Iterator[str]:
    outside = {x.partition("/")[0] for x in names} - {"mlot_kernels"}
    if len(outside) != 1 or not next(iter(outside)).endswith(".dist-info"):
        yield f"it holds more than mlot_kernels: {', '.join(sorted(outside))}"
    libraries = {Path(x).name for x in names if ".so" in Path(x).suffixes}
    if libraries != LIBRARIES.get(variant, LIBRARIES["cuda"]):
        yield f"its libraries are {', '.join(sorted(libraries)) or 'none'}"
    modules = {x for x in ROOT.glob("mlot_kernels/**/*") if x.suffix in (".py", ".md")}
    wanted = {str(x.relative_to(ROOT)) for x in modules} | {f"mlot_kernels/{x}" for x in DATA}
    if wanted - names:
        yield f"it lacks {', '.join(sorted(wanted - names))}"


def problems_of_library(library: Path, kind: str) -> Iterator[str]:
    dynamic = run("readelf", "-dW", library)
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic)) - set(ALLOWED["needed"][kind])
    if needed:
        yield f"it needs {', '.join(sorted(needed))}"
    if re.search(r"R(?:UN)?PATH", dynamic):
        yield "it has a search path of its own (RUNPATH)"
    undefined = run("nm", "-D", "--undefined-only", library)
    symbols = set(re.findall(r"^\s+[UwW] (\S+)$", undefined, re.MULTILINE))
    unknown = {x for x in symbols if "@" not in x} - set(ALLOWED["weak"]) - set(ALLOWED["torch_symbols"][kind])
    if unknown:
        yield f"torch {ALLOWED['torch']} and the system's libraries do not have {', '.join(sorted(unknown))}"
    for name, newest in ALLOWED["versions"].items():
        asked = {tuple(map(int, x.split("."))) for x in re.findall(rf"@{name}_([\d.]+)$", undefined, re.MULTILINE)}
        if asked and max(asked) > tuple(map(int, newest.split("."))):
            yield f"it asks for {name}_{'.'.join(map(str, max(asked)))}, newer than {newest}"
    content = library.read_bytes()
    here = {str(ROOT), sys.prefix, str(torch_folder()), tempfile.gettempdir(), str(Path.home()), "/home"}
    told = [path for path in sorted(here) if f"{path}/".encode() in content]
    if told:
        yield f"it holds paths of the machine that built it: {', '.join(told)}"
    if b"_GLOBAL__N__" in content:  # by which no build is like another
        yield "it holds names that nvcc made of a path and a process: give kernels a namespace with a name"


def torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def architectures(library: Path) -> set[str]:
    """What a fat binary holds code for, as sm_90 and compute_120; Triton brings the tool that reads it."""
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    code = set(re.findall(r"\.(sm_\w+)\.cubin", run(tool, "--list-elf", library)))
    ptx = set(re.findall(r"\.sm_(\w+)\.ptx", run(tool, "--list-ptx", library)))
    return code | {f"compute_{name}" for name in ptx}


def environment(folder: Path, torch: str = TORCH) -> Path:
    """A virtual environment with torch alone, outside the tree. Returns its python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    if torch == BORROWED:
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
        Path(site, "torch.pth").write_text(f"{torch_folder().parent}\n")
    else:
        install(python, f"torch=={torch}")
    return python


def install(python: Path, *what: str | Path) -> None:
    run(*PIP, "--python", python, "install", "-q", *what)


def works(wheel: Path, python: Path, *selftest: str) -> str:
    """Installs it, imports it with warnings as errors and runs the selftest. Returns what ``info`` says of it.

    The import loads the libraries, and a warning says which one did not: that of CUDA where torch has CUDA, for which
    it needs no GPU.
    """
    install(python, "--no-deps", "--force-reinstall", wheel)
    clean = {name: x for name, x in os.environ.items() if not name.startswith(("MLOT_", "PYTHON"))}
    with tempfile.TemporaryDirectory() as elsewhere:
        where = {"cwd": elsewhere, "env": clean}
        warnings = ("-W", "error", "-W", "ignore:Failed to initialize NumPy")  # torch's own, where NumPy is not there
        imported = run(python, *warnings, "-c", "import mlot_kernels; print(mlot_kernels.__file__)", **where)
        if not Path(imported.strip()).is_relative_to(python.parents[1]):
            raise SystemExit(f"{imported.strip()} was imported, not what {wheel.name} installed")
        run(python, "-m", "mlot_kernels", "selftest", *selftest, **where)
        said = run(python, "-m", "mlot_kernels", "info", **where)
    return str(re.search(r"^ +build +(.+)$", said, re.MULTILINE)[1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m wheels.check", description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="*", type=Path, help="by default all of dist")
    parser.add_argument("--torch", default=TORCH, help=f"of the clean environment; or '{BORROWED}': this one's")
    chosen = parser.parse_args(arguments)
    wheels = chosen.wheels or sorted(ROOT.glob("dist/*/*.whl"))
    if not wheels:
        raise SystemExit("there are no wheels in dist; make wheels builds them")
    from rich.console import Console  # for the tables alone
    from rich.table import Table

    console = Console()
    table = Table("wheel", "file", "clean environment")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        with console.status(f"installing torch {chosen.torch} into a clean environment"):
            python = environment(Path(folder) / "clean", chosen.torch)
        for wheel in wheels:
            with console.status(wheel.name):
                wrong = list(problems(wheel))
                if not wrong:
                    works(wheel, python)
            failed |= bool(wrong)
            table.add_row(wheel.name, "\n".join(wrong) or "right", "not tried" if wrong else "works")
    console.print(table)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
