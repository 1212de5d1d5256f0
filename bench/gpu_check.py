"""``make gpu-check``: everything that needs a GPU, in one command, and ``verified.json`` from what it saw.

    python -m bench.gpu_check [--out DIR] [--minutes 9]

needs a GPU, torch, triton and pytest; nvcc and ninja for the C++ kernels; no network. Each part runs in a process of
its own under a limit of time, so that neither a failure nor a crash stops the next. ``DIR/gpu_check.json`` is written
after each; the exit status is 1 if any part failed or ran out of time, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu_parts import ROOT, SKIPPED
from mlot_kernels import info, verified

TAIL = 3000  # characters of a part's output that are kept
GRACE = 10.0  # seconds from the interrupt of a part that is out of time to its end; pytest writes its results meanwhile
LEAST = 0.25  # a part starts if at least this share of its limit is left
NO_GPU = 2
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
NEED_NO_GPU = ("tests/test_demo.py", "tests/bench", "tests/native", "tests/aot", "tests/test_contract.py")
UNSET = ("MLOT_BACKEND", "TRITON_INTERPRET")  # would change what is checked


@dataclass(frozen=True)
class Part:
    """One check, as the arguments of the Python that runs it.

    It passes with exit status 0; with ``SKIPPED`` it was skipped, and the last line of its output is the reason.

    Attributes:
        name: in the table.
        seconds: its limit.
        arguments: of this Python; ``{out}`` stands for the folder of the results.
        leaves: the files that it writes there.
    """

    name: str
    seconds: float
    arguments: tuple[str, ...]
    leaves: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a part. ``status``: ``ok``, ``failed``, ``skipped`` or ``timed out``; ``reason`` of the others."""

    name: str
    status: str
    seconds: float
    command: str
    reason: str
    tail: str


def parts() -> tuple[Part, ...]:
    """The contract first, so that an early end says most; what the last one derives needs the others' files."""
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    spread = ("-n", str(workers)) if importlib.util.find_spec("xdist") is not None else ()

    def ours(name: str, seconds: float, *leaves: str) -> Part:
        return Part(name, seconds, ("-m", "bench.gpu_parts", name, "--out", "{out}"), leaves)

    def tests(name: str, seconds: float, *which: str) -> Part:
        return Part(name, seconds, (*PYTEST, *spread, *which, f"--junit-xml={{out}}/{name}.xml"), (f"{name}.xml",))

    benchmarks = (*PYTEST, "bench", "--suite", "quick", "--device", "cuda", "--results", "{out}/benchmarks.json")
    return (
        ours("install", 60),
        Part("info", 20, ("-m", "mlot_kernels", "info")),
        ours("selftest", 60, "selftest.json"),
        tests("contract", 240, "tests/test_contract.py"),
        tests("tests", 120, "tests", *(f"--ignore={path}" for path in NEED_NO_GPU)),
        ours("stream_and_graph", 60, "stream_and_graph.json"),
        ours("large_offsets", 60, "large_offsets.json"),
        ours("memcheck", 60),
        ours("racecheck", 60),
        ours("cluster_barriers", 60),
        Part("benchmarks", 180, benchmarks, ("benchmarks.json",)),
        Part("verified", 15, ("-m", "bench.gpu_verified", "--out", "{out}"), ("verified.json",)),
    )


def check(parts: Sequence[Part], out: Path, minutes: float, facts: dict[str, Any]) -> list[Outcome]:
    """Run the parts in their order and write ``gpu_check.json`` after each.

    The last part's limit is kept free for it; the others share what is left of ``minutes``, and one is skipped where
    less than a quarter of its own limit is left.
    """
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        for name in part.leaves:
            (out / name).unlink(missing_ok=True)
    deadline = time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []
    for part in parts:
        reserved = parts[-1].seconds if part is not parts[-1] else 0.0
        left = deadline - time.monotonic() - reserved - GRACE
        print(f"\n== {part.name}")
        if left < LEAST * part.seconds:
            outcomes.append(Outcome(part.name, "skipped", 0.0, "", f"no longer fits into {minutes:g} minutes", ""))
        else:
            outcomes.append(run(part, out, min(part.seconds, left)))
        _write(out, facts, outcomes)
    return outcomes


def run(part: Part, out: Path, limit: float) -> Outcome:
    """Run one part for at most ``limit`` seconds, its output shown as it comes."""
    command = [sys.executable, *(argument.format(out=out) for argument in part.arguments)]
    tail: collections.deque[str] = collections.deque(maxlen=TAIL)

    def show(stream: Any) -> None:
        for line in stream:
            sys.stdout.write(line)
            tail.extend(line)

    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=_environment(),
        start_new_session=True,  # so that its children end with it
    )
    reader = threading.Thread(target=show, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        status, reason = _judge(process.wait(timeout=limit))
    except subprocess.TimeoutExpired:
        status, reason = "timed out", f"took more than {limit:.0f} s"
    finally:
        _end(process)
    reader.join(timeout=5)
    output = "".join(tail)
    if status == "skipped":
        reason = output.strip().splitlines()[-1] if output.strip() else "it gave no reason"
    seconds = round(time.monotonic() - start, 1)
    return Outcome(part.name, status, seconds, " ".join(command), reason, output)


def _judge(returned: int) -> tuple[str, str]:
    if returned == 0:
        return "ok", ""
    return ("skipped", "") if returned == SKIPPED else ("failed", f"exit status {returned}")


def _end(process: subprocess.Popen[str]) -> None:
    """Interrupt what still runs of a part, then kill it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children, too
        process.wait()


def _environment() -> dict[str, str]:
    """This checkout first, installed or not; unbuffered, so that nothing is lost with a process that is killed."""
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # in each of pytest's processes
    }


def _write(out: Path, facts: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    document = {"format": 1, **facts, "parts": [asdict(outcome) for outcome in outcomes]}
    temporary = out / "gpu_check.json.part"
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(out / "gpu_check.json")


def facts() -> dict[str, Any]:
    """Where and of what the check was made."""
    found = info.collect()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": found["machine"]["gpu"],
        "architecture": verified.architecture(0),
        "versions": {"python": found["machine"]["python"], **found["software"]},
        "commit": found["commit"],
    }


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [f"{'part':<18}{'status':<11}{'seconds':>8}"]
    lines += [f"{o.name:<18}{o.status:<11}{o.seconds:>8.1f}  {o.reason}".rstrip() for o in outcomes]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu-check"), help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="what does not fit into them is skipped")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"gpu-check needs a GPU, and torch {torch.__version__} sees none. It runs on a machine with an NVIDIA or "
            "AMD GPU, its torch, triton and pytest, and nvcc and ninja for the C++ kernels.",
            file=sys.stderr,
        )
        return NO_GPU
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the part in progress ends, too
    out = options.out.resolve()
    outcomes = check(parts(), out, options.minutes, facts())
    print(f"\n{table(outcomes)}\n\nresults: {out / 'gpu_check.json'}")
    return 1 if any(outcome.status in ("failed", "timed out") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
