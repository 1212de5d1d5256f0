"""``python -m mlot_kernels info``: what a bug report needs to say about a machine and an installation.

It never fails: what there is not, and what cannot be found out, is None in ``collect``, and ``report`` says why.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from mlot_kernels.backends import BACKENDS, explain
from mlot_kernels.parity import cases_of
from mlot_kernels.registry import OPERATORS

PACKAGE = Path(__file__).parent
CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
VARIABLES = ("MLOT_BACKEND", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST")
# As /proc/cpuinfo names them: x86-64, then aarch64.
INSTRUCTION_SETS = re.compile(
    r"avx|avx2|fma|f16c|avx_vnni|avx512\w*|amx_\w+|neon|asimd|asimdhp|sve|sve2|bf16|i8mm|svebf16|svei8mm"
)

Missing = dict[str, str]  # what is None -> why
T = TypeVar("T")


class _Absent(Exception):
    """There is no such thing here; the message says how that shows."""


class _Unknown(Exception):
    """It cannot be found out; the message says why."""


def collect() -> dict[str, Any]:
    """Everything that ``report`` prints, as plain data for JSON. None is what there is not or what is not known.

    Returns:
        ``machine``: ``name`` (for file names), ``cpu``, ``cpu_vendor``, ``cpu_family``, ``cpu_model``, ``cores`` (the
        logical ones that this process may use), ``instruction_sets``, ``last_level_cache`` and ``memory`` in bytes,
        ``gpu`` (the first one: ``name``, ``capability``, ``memory``, ``driver``), ``system``, ``python``.
        ``commit``: ``id``, and ``dirty``, whether the checkout has changes beside it.
        ``package``: ``version``, ``location``, ``build`` (what its native libraries were built from and for:
        ``commit``, ``cuda``, ``architectures``).
        ``software``: ``torch``, ``cuda`` and ``rocm`` (those that torch was built for), ``driver``, ``nvcc``,
        ``triton``, ``cpu_capability`` (the instruction set that torch uses), ``threads`` (those of torch),
        ``platform`` (the system's kernel and C library).
        ``gpus``: each as in ``machine``.
        ``environment``: those of ``VARIABLES`` that are set.
        ``operators``: device -> operator -> ``chosen``, ``refusals`` and ``passed_over``, as ``explain`` has them for
        the operator's first case in float32.
        ``missing``: what is None -> why.
    """
    missing: Missing = {}
    driver = _attempt(missing, "driver", _driver)
    gpus = _attempt(missing, "gpu", _gpus) or []
    for gpu in gpus:
        gpu["driver"] = driver
    build = _attempt(missing, "build", _build)
    return {
        "machine": _machine(missing, gpus[0] if gpus else None),
        "commit": _attempt(missing, "commit", lambda: _commit(build)) or {"id": None, "dirty": None},
        "package": {
            "version": _attempt(missing, "version", lambda: importlib.metadata.version("mlot-kernels")),
            "location": str(PACKAGE),
            "build": build,
        },
        "software": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "rocm": torch.version.hip,
            "driver": driver,
            "nvcc": _attempt(missing, "nvcc", _nvcc),
            "triton": _attempt(missing, "triton", _triton),
            "cpu_capability": _attempt(missing, "cpu_capability", torch.backends.cpu.get_cpu_capability),
            "threads": torch.get_num_threads(),
            "platform": platform.platform(),
        },
        "gpus": gpus,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "operators": {device: _operators(device) for device in ("cpu", *(["cuda"] if gpus else []))},
        "missing": missing,
    }


def report() -> str:
    """One block of plain text, to paste into a bug report."""
    found = collect()
    lines: list[str] = []
    for title, facts in _sections(found):
        lines.append(title)
        lines += [f"  {name:<18} {fact}".rstrip() for name, fact in facts]
    for device, operators in found["operators"].items():
        lines += _table(device, operators, found["environment"].get("MLOT_BACKEND"))
    return "\n".join(lines)


def _sections(found: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    machine, commit, package, software = (found[key] for key in ("machine", "commit", "package", "software"))

    def said(key: str, value: Any) -> str:
        return found["missing"].get(key, "unknown") if value is None else str(value)

    build = said("build", None) if "build" in found["missing"] else "pure Python, no native library"
    if package["build"]:
        build = ", ".join(f"{key} {value}" for key, value in package["build"].items())
    facts = [
        ("location", package["location"]),
        ("commit", said("commit", commit["id"]) + (", with changes beside it" if commit["dirty"] else "")),
        ("build", build),
    ]
    yield f"mlot_kernels {said('version', package['version'])}", facts

    kind = {what: machine[f"cpu_{what}"] for what in ("vendor", "family", "model")}
    facts = [
        ("name", machine["name"]),
        ("system", software["platform"]),
        ("cpu", ", ".join([machine["cpu"], *(f"{what} {value}" for what, value in kind.items() if value is not None)])),
        ("cores", f"{machine['cores']}, of which torch uses {software['threads']}"),
        ("instruction sets", said("instruction_sets", " ".join(machine["instruction_sets"]) or None)),
        ("torch computes in", said("cpu_capability", software["cpu_capability"])),
        ("last-level cache", said("last_level_cache", _size(machine["last_level_cache"]))),
        ("memory", said("memory", _size(machine["memory"]))),
    ]
    for gpu in found["gpus"]:
        facts.append(("gpu", f"{gpu['name']}, compute capability {gpu['capability']}, {_size(gpu['memory'])}"))
    facts += [] if found["gpus"] else [("gpu", said("gpu", None))]
    yield "machine", [*facts, ("driver", said("driver", software["driver"]))]

    built = [f"{name} {software[key]}" for key, name in (("cuda", "CUDA"), ("rocm", "ROCm")) if software[key]]
    facts = [
        ("python", machine["python"]),
        ("torch", f"{software['torch']}, built for {' and '.join(built) or 'the CPU alone'}"),
        ("triton", said("triton", software["triton"])),
        ("nvcc", said("nvcc", software["nvcc"])),
        ("environment", " ".join(f"{name}={value}" for name, value in found["environment"].items()) or "nothing set"),
    ]
    yield "software", facts


def _table(device: str, operators: dict[str, Any], named: str | None) -> list[str]:
    """Operators by backends, and the reasons as footnotes."""
    default = "auto" if named is None else "set"
    rows: list[tuple[str, ...]] = [("", *BACKENDS)]
    reasons: dict[str, int] = {}
    for operator, said in operators.items():
        cells = []
        for backend in BACKENDS:
            reason = said["refusals"][backend] or said["passed_over"].get(backend)
            number = "" if reason is None else f"({reasons.setdefault(reason, len(reasons) + 1)})"
            if backend == said["chosen"]:
                cells.append(default)
            else:
                cells.append(number if said["refusals"][backend] else f"runs {number}".rstrip())
        rows.append((operator, *cells))
    width = max(len(row[0]) for row in rows)
    meaning = "auto: runs unless another is named" if named is None else f"set: named by MLOT_BACKEND={named}"
    lines = [f"operators on {device} ({meaning}; runs: if it is named; a number alone: cannot run)"]
    for operator, *cells in rows:
        lines.append(f"  {operator:<{width}}  " + "  ".join(f"{cell:<9}" for cell in cells).rstrip())
    return lines + [f"  ({number}) {reason}" for reason, number in reasons.items()]


def _attempt(missing: Missing, what: str, find: Callable[[], T]) -> T | None:
    """What ``find`` returns; None, and a word on why in ``missing``, where it raises."""
    try:
        return find()
    except _Absent as error:
        missing[what] = f"none ({error})"
    except Exception as error:
        missing[what] = f"unknown ({_words(error)})"
    return None


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, (_Absent, _Unknown)) else f"{type(error).__name__}: {error}"


def _machine(missing: Missing, gpu: dict[str, Any] | None) -> dict[str, Any]:
    first = _attempt(missing, "instruction_sets", _first_processor) or {}
    # aarch64 has the second name of each pair.
    vendor = first.get("vendor_id", first.get("CPU implementer"))
    family = _attempt(missing, "cpu_family", lambda: _integer(first, "cpu family", "CPU architecture"))
    model = _attempt(missing, "cpu_model", lambda: _integer(first, "model", "CPU part"))
    cpu = first.get("model name") or platform.processor() or platform.machine() or "unknown"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    of_family = "" if family is None else f" family {family}"
    flags = first.get("flags", first.get("Features", "")).split()
    return {
        "name": _slug(f"{cpu}{of_family} {cores} cores" if gpu is None else gpu["name"]),
        "cpu": cpu,
        "cpu_vendor": vendor,
        "cpu_family": family,
        "cpu_model": model,
        "cores": cores,
        "instruction_sets": sorted(flag for flag in flags if INSTRUCTION_SETS.fullmatch(flag)),
        "last_level_cache": _attempt(missing, "last_level_cache", _last_level_cache),
        "memory": _attempt(missing, "memory", lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _first_processor() -> dict[str, str]:
    """What the kernel says of the first processor."""
    block = CPUINFO.read_text().strip().split("\n\n")[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _integer(facts: dict[str, str], *names: str) -> int | None:
    """The first of these that is there, decimal or hexadecimal."""
    return next((int(facts[name], 0) for name in names if name in facts), None)


def _last_level_cache() -> int:
    """Bytes of the largest level's cache that serves the first processor."""
    levels = {int((cache / "level").read_text()): cache for cache in CACHES.glob("index*")}
    if not levels:
        raise _Unknown(f"{CACHES} names no cache")
    number, unit = re.fullmatch(r"(\d+)([KMG]?)", (levels[max(levels)] / "size").read_text().strip()).groups()  # type: ignore[union-attr]
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def _gpus() -> list[dict[str, Any]]:
    if torch.version.cuda is None and torch.version.hip is None:
        raise _Absent("torch is built for the CPU alone")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        raise _Absent("; ".join(["torch finds none", *(str(warning.message) for warning in said)]))
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [{"name": x.name, "capability": f"{x.major}.{x.minor}", "memory": x.total_memory} for x in found]


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]


def _nvcc() -> str:
    said = _output("nvcc", "--version")
    release = re.search(r"release ([\d.]+)", said)
    return said if release is None else release[1]


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise _Absent("not installed") from None


def _build() -> dict[str, Any] | None:
    path = PACKAGE / "_build.json"
    return dict(json.loads(path.read_text())) if path.exists() else None


def _commit(build: dict[str, Any] | None) -> dict[str, Any]:
    """The commit of the checkout that the package lies in, else that it was installed from, else built from."""
    reasons = []
    for source in (_of_checkout, _of_installation):
        try:
            return source()
        except Exception as error:
            reasons.append(_words(error))
    if build is not None and build.get("commit"):
        return {"id": build["commit"], "dirty": None}
    raise _Unknown("; ".join(reasons))


def _of_checkout() -> dict[str, Any]:
    git = ("git", "--no-optional-locks", "-C", str(PACKAGE))
    _output(*git, "ls-files", "--error-unmatch", "__init__.py")  # fails where it lies in another project's checkout
    return {"id": _output(*git, "rev-parse", "HEAD"), "dirty": bool(_output(*git, "status", "--porcelain"))}


def _of_installation() -> dict[str, Any]:
    """As PEP 610 has it, from the directory of the installed package's metadata."""
    text = importlib.metadata.distribution("mlot-kernels").read_text("direct_url.json")
    if text is None or "vcs_info" not in json.loads(text):
        raise _Unknown("the package was not installed from a repository")
    return {"id": json.loads(text)["vcs_info"]["commit_id"], "dirty": False}


def _output(*command: str) -> str:
    """What a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        raise _Absent(f"{command[0]} is not on PATH") from None
    if done.returncode != 0:
        raise _Unknown(f"{command[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def _slug(text: str) -> str:
    """For a file name: lower case, without trademarks and clock rates."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|@ ?[\d.]+ghz", " ", text.lower())).strip("-")


def _size(count: int | None) -> str | None:
    if count is None:
        return None
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _operators(device: str) -> dict[str, Any]:
    """Operator -> which backend would run a small call of it, and why others would not."""
    found: dict[str, Any] = {}
    for name, operator in sorted(OPERATORS.items()):
        try:
            case = cases_of(operator, torch.float32, device)[0]
            said = explain(case.call, case.inputs, None)
            found[name] = {
                "chosen": said.chosen,
                "refusals": dict(said.refusals),
                "passed_over": dict(said.passed_over),
            }
        except Exception as error:
            reason = f"unknown ({_words(error)})"
            found[name] = {"chosen": None, "refusals": dict.fromkeys(BACKENDS, reason), "passed_over": {}}
    return found
