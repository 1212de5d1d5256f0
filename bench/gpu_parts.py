"""Parts of ``gpu_check`` that run in processes of their own: ``python -m bench.gpu_parts PART --out DIR``.

A part ends with 0 where all is well, with ``SKIPPED`` and its reason as the last line, or with 1. What it saw of each
operator on each backend it writes to ``DIR/PART.json``, a list of ``Line``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import large_calls
from mlot_kernels import (
    BackendUnavailable,
    Rows,
    parity,
)
from mlot_kernels.backends import PREFERENCE
from mlot_kernels.cases import Case, Outputs
from mlot_kernels.registry import OPERATORS
from mlot_kernels.selftest import results
from mlot_kernels.verified import NEEDED

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 77  # the exit status that test harnesses agree on
SLEEP = 20_000_000  # cycles: some 10 ms
BARRIER = ROOT / "bench/cluster_barrier.cu"
NO_CLUSTERS = 2  # its exit status where the GPU has none
FIRST = 3  # cases of each operator under a sanitizer, which is slow

Results = tuple[list[Tensor], list[Tensor]]  # outputs, gradients


class Skip(Exception):
    """The part cannot run here, for the reason in the message."""


@dataclass(frozen=True)
class Line:
    """One check of one operator on one backend."""

    operator: str
    backend: str
    name: str
    failure: str | None


def backends_of(operator: str, device: str) -> list[str]:
    return [name for name in PREFERENCE[device] if name in OPERATORS[operator].forward]


def install(out: Path) -> list[Line]:
    """Into this Python's environment, whose packages stay as they are."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    returned, output = _shown([sys.executable, "-m", "pip", "install", *options, "-e", str(ROOT)])
    if "externally-managed-environment" in output:
        raise Skip("pip may not write into this environment; the other parts find the checkout by PYTHONPATH")
    if returned:
        raise SystemExit(f"pip ended with {returned}; the other parts find the checkout by PYTHONPATH")
    return []


def selftest(out: Path) -> list[Line]:
    """What a user's ``python -m mlot_kernels selftest --device cuda`` checks."""
    lines: list[Line] = []
    for result in results("cuda"):
        print(result)
        for failure in result.failures:
            name = f"{failure.check}, {failure.case}"
            lines.append(Line(result.subject, result.backend, name, failure.message))
        if not result.failures:
            lines.append(Line(result.subject, result.backend, f"{result.cases} cases", None))
    return lines


def stream_and_graph(out: Path) -> list[Line]:
    """Every case on a stream of its own, and captured in a graph and replayed, gives the bits of the plain call."""
    lines: list[Line] = []
    for operator in OPERATORS.values():
        for backend in backends_of(operator.name, "cuda"):
            for case in parity.cases_of(operator, torch.float32, "cuda"):
                for way in (late_on_a_stream, captured):
                    if not case.waits:
                        name = f"{case.name}, {way.__name__.replace('_', ' ')}"
                        lines += judged(operator.name, backend, name, _same_way, case, backend, way)
    return lines


def _same_way(case: Case, backend: str, way: Callable[[Case, str, list[Tensor]], Results]) -> str | None:
    outputs = case.call(case.inputs, backend)
    upstream = parity.upstream_of(outputs)
    plain = differentiated(case, backend, case.inputs, upstream)
    return difference(way(case, backend, upstream), plain)


def differentiated(case: Case, backend: str, inputs: tuple[Tensor, ...], upstream: list[Tensor]) -> Results:
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    outputs = case.call(leaves, backend)
    return [y.detach() for y in outputs], parity.gradients_of(outputs, leaves, upstream)


def late_on_a_stream(case: Case, backend: str, upstream: list[Tensor]) -> Results:
    """On a stream whose inputs are NaN until it gets to them: a kernel on another stream would read those."""
    inputs = blank(case.inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        fill(inputs, case.inputs)
        results = differentiated(case, backend, inputs, upstream)
    stream.synchronize()
    return results


def captured(case: Case, backend: str, upstream: list[Tensor]) -> Results:
    """Captured on NaN and replayed on the inputs."""
    inputs = blank(case.inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what happens only once, such as loading a kernel, happens before the capture
        differentiated(case, backend, inputs, upstream)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, gradients = differentiated(case, backend, inputs, upstream)
    fill(inputs, case.inputs)
    graph.replay()
    torch.cuda.synchronize()
    return [y.clone() for y in outputs], [g.clone() for g in gradients]  # the graph's memory goes with it


def blank(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """NaN, laid out as the inputs are."""
    like = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in inputs)
    return tuple(x.fill_(float("nan")) for x in like)


def fill(targets: tuple[Tensor, ...], sources: tuple[Tensor, ...]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def difference(ours: Results, expected: Results) -> str | None:
    """Where the two differ by a bit, in words."""
    for kind, xs, ys in zip(("output", "gradient"), ours, expected, strict=True):
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if (x.dtype, x.shape) != (y.dtype, y.shape):
                return f"{kind} {i}: {x.dtype} {tuple(x.shape)}, expected {y.dtype} {tuple(y.shape)}"
            if not torch.equal(_bits(x), _bits(y)):
                other = ~((x == y) | ((x != x) & (y != y)))
                return (
                    f"{kind} {i}: {int(other.sum())} of {x.numel()} values differ, or the sign of 0 or bits of NaN do"
                )
    return None


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def large_offsets(out: Path, device: str = "cuda", elements: int = 2**31, vocabulary: int = 151_936) -> list[Line]:
    """Rows of bfloat16 logits that lie behind so many elements give the bits that they give in a small tensor."""
    T = elements // (2 * vocabulary) + 4
    needed = 10 * 2 * (2 * T * vocabulary)  # the reference's backward makes float32 temporaries of the logits' size
    if device == "cuda" and (free := torch.cuda.mem_get_info()[0]) < needed:
        raise Skip(f"{needed >> 30} GiB of GPU memory are needed, {free >> 30} are free")
    generator = torch.Generator(device).manual_seed(0)
    large = torch.randn(2, T, vocabulary, dtype=torch.bfloat16, device=device, generator=generator)
    counted = torch.zeros(2, T, dtype=torch.bool, device=device)
    counted[:, :1] = counted[:, -3:] = True  # the last three of the second sequence lie behind the elements
    rows = Rows.from_mask(counted)
    rows = Rows(rows.index[:, :4], rows.count, rows.span[:, :4], rows.spans, rows.length)
    small, its_rows = large_calls.ends(large), Rows.from_mask(counted.new_ones(2, 4))
    lines: list[Line] = []
    for name, (operator, call) in large_calls.CALLS.items():
        for backend in backends_of(operator, device):
            both = (large, rows), (small, its_rows)
            lines += judged(operator, backend, name, _same_at_large_offsets, call, backend, *both)
    return lines


def _same_at_large_offsets(
    call: Callable[[Tensor, Rows, str], Outputs],
    backend: str,
    large: tuple[Tensor, Rows],
    small: tuple[Tensor, Rows],
) -> str | None:
    outputs, gradient = _with_gradient(call, backend, *large)
    its_outputs, its_gradient = _with_gradient(call, backend, *small)
    if found := difference((outputs, [large_calls.ends(gradient)]), (its_outputs, [its_gradient])):
        return found
    astray = int(gradient.count_nonzero()) - int(its_gradient.count_nonzero())
    return f"{astray} elements of the gradient are not 0 where no row counts" if astray else None


def _with_gradient(
    call: Callable[[Tensor, Rows, str], Outputs], backend: str, x: Tensor, rows: Rows
) -> tuple[list[Tensor], Tensor]:
    leaf = x.detach().requires_grad_()
    outputs = call(leaf, rows, backend)
    smooth = tuple(y for y in outputs if y.requires_grad)
    (gradient,) = parity.gradients_of(smooth, (leaf,), parity.upstream_of(smooth))
    return [y.detach() for y in outputs], gradient


def memcheck(out: Path) -> list[Line]:
    """No kernel of ours touches memory that is not its own."""
    return _sanitized("memcheck")


def racecheck(out: Path) -> list[Line]:
    """No two threads of a kernel of ours meet in shared memory."""
    return _sanitized("racecheck")


def cluster_barriers(out: Path) -> list[Line]:
    """How long the barrier of a cluster and a join over it take: what the CUDA kernels' design rests on."""
    found = subprocess.run(
        [sys.executable, "-c", "import mlot_toolchain; print(mlot_toolchain.find_toolkit().home)"],
        cwd=ROOT / "csrc",
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise Skip(found.stderr.strip().splitlines()[-1].removeprefix("mlot_toolchain.Missing: "))
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/cluster_barrier"
        options = ("-std=c++17", "-O3", "-arch=native", f"-I{ROOT}/csrc/include", str(BARRIER), "-o", program)
        if _shown([f"{found.stdout.strip()}/bin/nvcc", *options])[0]:
            raise SystemExit("nvcc failed")
        returned, output = _shown([program])
    if returned == NO_CLUSTERS:
        raise Skip(output.strip())
    if returned:
        raise SystemExit(f"it ended with {returned}")
    return []


def _sanitized(tool: str) -> list[Line]:
    if not list(kernels()):
        raise Skip("there is no GPU kernel but torch's own, which are not checked here")
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise Skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "1",
        sys.executable,
        "-m",
        "bench.gpu_parts",
        "first_cases",
    ]
    # Every tensor its own allocation, so that what lies behind it belongs to nobody.
    returned, output = _shown(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "Device not supported" in output:
        raise Skip("compute-sanitizer refuses this device: Device not supported")
    if returned:
        raise SystemExit(f"compute-sanitizer ended with {returned}")
    return []


def kernels() -> Iterator[tuple[str, str]]:
    """Every operator and backend whose GPU kernels are this package's."""
    for name in OPERATORS:
        for backend in backends_of(name, "cuda"):
            if backend in NEEDED:
                yield name, backend


def first_cases(out: Path) -> list[Line]:
    """What a sanitizer watches."""
    return [
        line
        for name, backend in kernels()
        for dtype in (torch.float32, torch.bfloat16)
        for case in parity.cases_of(OPERATORS[name], dtype, "cuda")[:FIRST]
        for line in judged(name, backend, f"{case.name}, {dtype}", _ran, case, backend)
    ]


def _ran(case: Case, backend: str) -> None:
    parity.run(case, backend)
    torch.cuda.synchronize()


def judged(
    operator: str, backend: str, name: str, compare: Callable[..., str | None], *arguments: Any
) -> Iterator[Line]:
    """The line of a comparison, an error being a failure; none where the backend refuses the call."""
    try:
        yield Line(operator, backend, name, compare(*arguments))
    except BackendUnavailable as refused:
        print(f"{operator} on {backend}, {name}: left out: {refused}")
    except Exception as error:
        traceback.print_exc()
        yield Line(operator, backend, name, f"{type(error).__name__}: {error}")


def _shown(command: Sequence[str], **environment: str) -> tuple[int, str]:
    """Exit status and output of a command, which is printed as it comes."""
    print(" ".join(command))
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
    ) as process:
        for line in process.stdout or ():
            print(line, end="")
            lines.append(line)
    return process.returncode, "".join(lines)


_PARTS = (install, selftest, stream_and_graph, large_offsets, memcheck, racecheck, cluster_barriers)
PARTS = {part.__name__: part for part in _PARTS}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_parts", description=__doc__)
    parser.add_argument("part", choices=(*PARTS, "first_cases"))
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args(arguments)
    try:
        lines = (PARTS | {"first_cases": first_cases})[options.part](options.out)
    except Skip as reason:
        print(reason)
        return SKIPPED
    return report(options.part, lines, options.out)


def report(part: str, lines: Sequence[Line], out: Path) -> int:
    """Write the lines and print those that failed."""
    if lines:
        (out / f"{part}.json").write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    failed = [line for line in lines if line.failure is not None]
    for line in failed:
        print(f"{line.operator} on {line.backend}, {line.name}: {line.failure}")
    print(f"{len(lines)} checks, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
