"""``python -m mlot_kernels tune``: the tiles and warps with which the Triton kernels are fastest on this GPU.

For each kernel of ``triton_tiles.json`` every candidate takes the default's place, all other kernels keeping theirs, in
the operators' calls of a real size that launch the kernel (``large_cases`` of their ``cases.py``): in forward where it
is launched there, else in forward and backward. Whose results are not the default's within rounding is out. The fastest
enters the table under this GPU's architecture if it is faster than the default by more than ``MARGIN``, two times over.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlot_kernels import parity, triton_tiles, verified
from mlot_kernels.cases import Case
from mlot_kernels.registry import OPERATORS
from mlot_kernels.triton_tiles import PATH, Options, overriding

MARGIN = 0.03
DTYPES = (torch.float32, torch.bfloat16)
CANNOT_RUN = 2

Measure = Callable[[Callable[[], Any]], float]  # the seconds that a function takes


@dataclass(frozen=True)
class Call:
    """One call of an operator on backend ``triton``; ``run`` returns outputs, and under ``backward`` gradients, too."""

    name: str
    run: Callable[[], list[Tensor]]
    backward: bool = False


@dataclass(frozen=True)
class Trial:
    """How many times as fast as with the default the calls are; None, and why, where the candidate is out."""

    options: Options
    speed: float | None
    problem: str = ""


@dataclass(frozen=True)
class Finding:
    """What the trials of one kernel came to. ``chosen``: the fastest, with the slower of its two speeds; or None."""

    kernel: str
    calls: int
    trials: Sequence[Trial]
    chosen: Trial | None


def operators() -> list[str]:
    return [name for name, operator in OPERATORS.items() if "triton" in operator.forward]


def calls(
    operators: Sequence[str], device: str, dtypes: Sequence[torch.dtype] = DTYPES, **sizes: int
) -> Iterator[Call]:
    """The operators' calls of a real size, forward alone and with backward; ``sizes`` as ``large_cases`` takes them."""
    for operator, dtype in itertools.product(operators, dtypes):
        cases = importlib.import_module(f"mlot_kernels.ops.{operator}.cases")
        for case in cases.large_cases(dtype, device, **sizes):
            name = f"{operator}, {case.name}, {dtype}"
            yield Call(name, functools.partial(_forward, case))
            if OPERATORS[operator].function is not None:
                yield Call(f"{name}, with backward", _with_backward(case), backward=True)


def _forward(case: Case) -> list[Tensor]:
    with torch.no_grad():
        return list(case.call(case.inputs, "triton"))


def _with_backward(case: Case) -> Callable[[], list[Tensor]]:
    leaves = tuple(x.detach().requires_grad_() for x in case.inputs)
    upstream = parity.upstream_of(tuple(_forward(case)))

    def run() -> list[Tensor]:
        outputs = case.call(leaves, "triton")
        return [*(y.detach() for y in outputs), *parity.gradients_of(outputs, leaves, upstream)]

    return run


def tune(calls: Sequence[Call], measure: Measure) -> Iterator[Finding]:
    """What each kernel that the calls launch is fastest with, as soon as it is known."""
    launches = [(call, _launched(call)) for call in calls]
    for kernel, entry in triton_tiles.TABLE.kernels.items():
        ours = [call for call, launched in launches if kernel in launched]
        ours = [call for call in ours if not call.backward] or ours
        if ours and entry.candidates:
            yield _finding(kernel, entry.candidates, ours, measure)


def _launched(call: Call) -> set[str]:
    with overriding() as launched:
        call.run()
    return launched


def _finding(kernel: str, candidates: Sequence[Options], calls: Sequence[Call], measure: Measure) -> Finding:
    trials = _trials(kernel, candidates, calls, measure)
    fastest = max(trials, key=lambda trial: trial.speed or 0.0)
    chosen = None
    if (fastest.speed or 0.0) > 1 + MARGIN:  # the best of several is so by luck, too: it must be so again
        (again,) = _trials(kernel, [fastest.options], calls, measure)
        speed = min(fastest.speed or 0.0, again.speed or 0.0)
        chosen = Trial(fastest.options, speed) if speed > 1 + MARGIN else None
    return Finding(kernel, len(calls), trials, chosen)


def _trials(kernel: str, candidates: Sequence[Options], calls: Sequence[Call], measure: Measure) -> list[Trial]:
    speeds: list[list[float]] = [[] for _ in candidates]
    problems = [""] * len(candidates)
    for call in calls:
        with overriding():
            expected = call.run()
            default = measure(call.run)
        for i, options in enumerate(candidates):
            if problems[i]:
                continue
            try:
                with overriding({kernel: options}):
                    _hold_against(expected, call.run())
                    speeds[i].append(default / measure(call.run))
            except Exception as error:  # of any kind that a compiler, a driver or a wrong result raises
                problems[i] = f"{call.name}: {type(error).__name__}: {' '.join(str(error).split())}"
    return [
        Trial(options, None, problem) if problem else Trial(options, _geometric_mean(speed))
        for options, speed, problem in zip(candidates, speeds, problems, strict=True)
    ]


def _geometric_mean(speeds: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, speeds)) / len(speeds))


def _hold_against(expected: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Raises where results differ by more than a sum's order explains, before and after they are rounded."""
    for x, y in zip(results, expected, strict=True):
        if not y.is_floating_point():
            torch.testing.assert_close(x, y)
        elif y.numel():
            largest = float(y.masked_fill(~y.isfinite(), 0).abs().max())
            rounding = 2 * torch.finfo(y.dtype).eps
            summing = 32 * torch.finfo(torch.float32).eps * largest
            torch.testing.assert_close(x, y, rtol=rounding, atol=summing, equal_nan=True)


def on_gpu(run: Callable[[], Any]) -> float:
    """Seconds that the GPU takes: the median of replays of a CUDA graph, since the host launches more slowly."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return float(do_bench(graph.replay, return_mode="median")) / 1000


def enter(document: dict[str, Any], architecture: str, finding: Finding, facts: Mapping[str, str]) -> None:
    """Put a finding into the table's document, in place of what the architecture has for that kernel."""
    entries = document["architectures"].setdefault(architecture, {})
    entries.pop(finding.kernel, None)
    if finding.chosen is not None:
        speed = round(finding.chosen.speed or 0.0, 3)
        entries[finding.kernel] = {"options": dict(finding.chosen.options), "speed": speed, **facts}
    if not entries:
        del document["architectures"][architecture]
    triton_tiles.parse(document)


def dumps(document: Mapping[str, Any]) -> str:
    """The table's text: what holds nothing but numbers and words is one line."""
    text = json.dumps(document, indent=2)
    return re.sub(r"\{\s+([^{}\[\]]+?)\s+\}", lambda found: "{" + re.sub(r"\s+", " ", found[1]) + "}", text) + "\n"


def why_not() -> str | None:
    """Why nothing can be measured here, in words; None where it can."""
    if not torch.cuda.is_available():
        return (
            f"it needs a GPU, and torch {torch.__version__} sees none; run it on a machine with an NVIDIA or AMD GPU, "
            "a torch that is built for it, and Triton"
        )
    if importlib.util.find_spec("triton") is None:
        return "it needs Triton, which is not installed; pip install 'mlot-kernels[triton]'"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 makes Triton interpret the kernels on the CPU, where they say nothing; unset it"
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = operators()
    parser.add_argument(
        "--operators", nargs="+", choices=names, default=names, metavar="NAME", help=f"of: {', '.join(names)}"
    )
    parser.add_argument("--output", type=Path, default=PATH, help="the table to write, by default the package's own")


def main(arguments: argparse.Namespace) -> int:
    """Measure, print, write the table, and return the exit status: 0, or 2 where nothing can be measured or written."""
    reason = why_not()
    output: Path = arguments.output
    if reason is None and not os.access(output if output.exists() else output.parent, os.W_OK):
        reason = f"{output} cannot be written; name another file with --output"
    if reason is not None:
        print(f"tune: {reason}", file=sys.stderr)
        return CANNOT_RUN
    device = torch.cuda.current_device()
    architecture = verified.architecture(device)
    name = torch.cuda.get_device_name(device)
    facts = {"device": name, "torch": torch.__version__, "triton": importlib.metadata.version("triton")}
    print(f"{architecture} ({name}), torch {facts['torch']}, triton {facts['triton']}; speed: the default is 1")
    document = json.loads(PATH.read_text())
    for finding in tune(list(calls(arguments.operators, f"cuda:{device}")), on_gpu):
        print("\n".join(lines(finding)), flush=True)
        enter(document, architecture, finding, facts)
        output.write_text(dumps(document))  # after each, so that an early end loses nothing
    print(f"written: {output}")
    return 0


def lines(finding: Finding) -> Iterator[str]:
    """The finding as lines of a table."""
    default = triton_tiles.TABLE.options(finding.kernel)
    yield f"{finding.kernel:<28}{_said(default):<28}default; calls: {finding.calls}"
    for trial in finding.trials:
        chosen = finding.chosen is not None and trial.options == finding.chosen.options
        speed = f"out: {trial.problem}" if trial.speed is None else f"{trial.speed:.3f}{' chosen' * chosen}"
        yield f"{'':<28}{_said(trial.options):<28}{speed}"


def _said(options: Options) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


if __name__ == "__main__":
    from mlot_kernels.__main__ import main as command_line

    sys.exit(command_line(["tune", *sys.argv[1:]]))
