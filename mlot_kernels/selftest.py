"""``python -m mlot_kernels selftest``: is every operator and every loss right on this machine?

Each backend that can run here is held against the definition in four precisions, and its gradient against finite
differences in float64, on the inputs of the contract tests (``cases.py`` of each operator) and ``losses/cases.py``.
Only where a case has a kink or a tie is gradcheck left out, and of what needs SciPy all, where there is none.

It needs nothing but torch; where rich is installed, a terminal gets a drawn table. All inputs have fixed seeds, so that
two runs agree.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from mlot_kernels import parity
from mlot_kernels.backends import BACKENDS, BackendUnavailable, explain
from mlot_kernels.cases import Case
from mlot_kernels.losses.cases import LOSSES, tolerance
from mlot_kernels.losses.cases import cases as loss_cases
from mlot_kernels.registry import OPERATORS

DEVICES = ("cpu", "cuda")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
SUBJECTS = (*sorted(OPERATORS), *LOSSES)
AUTO = "auto"  # of a loss: each operator on the backend that it gets if none is named
HEADER = ("operator or loss", "backend", "cases", *DTYPES, "gradcheck")

Row = tuple[str, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """One check that failed: ``check`` is a dtype's name or "gradcheck"."""

    check: str
    case: str
    message: str


@dataclass
class Result:
    """One operator or loss on one backend; plain data, for ``dataclasses.asdict`` and JSON.

    Attributes:
        subject: the operator's name or the loss's class.
        backend, device: what it ran on; ``"auto"`` for a loss whose operators run on several.
        cases: how many were compared with the definition, a case counting once per dtype.
        left_out: reason -> the cases that could not run, each as "dtype: name".
        shares: dtype -> the largest error as a share of what is allowed; absent where a case failed or none ran.
        value_errors, gradient_errors: dtype -> the largest error relative to float64, see ``parity.Fidelity``; absent
            where a case failed, none ran, or there is no gradient.
        gradchecks: how many cases passed gradcheck.
        failures: every check that failed.
    """

    subject: str
    backend: str
    device: str
    cases: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    value_errors: dict[str, float] = field(default_factory=dict)
    gradient_errors: dict[str, float] = field(default_factory=dict)
    gradchecks: int = 0
    failures: list[Failure] = field(default_factory=list)

    def failed(self, check: str) -> bool:
        return any(failure.check == check for failure in self.failures)


def run(device: str = "cpu", backend: str | None = None, names: Sequence[str] = ()) -> list[Result]:
    """Test operators and losses.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        backend: test this one alone, and say so where it cannot run; None: all that can run on the device.
        names: operators and losses, of ``SUBJECTS``; empty: all.

    Raises:
        ValueError: there is no such device, backend or name here.
    """
    return list(results(device, backend, names))


def results(device: str = "cpu", backend: str | None = None, names: Sequence[str] = ()) -> Iterator[Result]:
    """As ``run``, each result as soon as it is there."""
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, and torch finds no GPU here; python -m mlot_kernels info says more")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if unknown := [name for name in names if name not in SUBJECTS]:
        raise ValueError(f"names must be of {', '.join(SUBJECTS)}, got {', '.join(unknown)}")
    return _results(device, backend, names or SUBJECTS)


def _results(device: str, backend: str | None, names: Sequence[str]) -> Iterator[Result]:
    for name in dict.fromkeys(names):
        cases = {label: _cases_of(name, dtype, device) for label, dtype in DTYPES.items()}
        whole = set()  # the backends that ran every case
        for each in BACKENDS if backend is None else (backend,):
            with _threads(1 if each == "reference" else torch.get_num_threads()):
                result = _test(name, cases, each, device)
            if result.cases or backend is not None:
                yield result
            if result.cases and not result.left_out:
                whole.add(each)
        if name in LOSSES and backend is None and _chosen(cases["float32"][0]) not in whole:
            with _threads(1):
                yield _test(name, cases, AUTO, device)


def _chosen(case: Case) -> str | None:
    """The backend of the first operator that a loss calls; where that has not all of them, users get a mixture."""
    return explain(case.call, case.inputs, None).chosen


def _cases_of(name: str, dtype: torch.dtype, device: str) -> list[Case]:
    if name in OPERATORS:
        return parity.cases_of(OPERATORS[name], dtype, device)
    return loss_cases(name, dtype, device)


def _test(name: str, cases: dict[str, list[Case]], backend: str, device: str) -> Result:
    result = Result(name, backend, device)
    for dtype, some in cases.items():
        found = [
            _attempt(result, dtype, case, _held_to_tolerance if name in LOSSES else parity.fidelity) for case in some
        ]
        measured = [fidelity for fidelity in found if fidelity is not None]
        if not measured or result.failed(dtype):
            continue
        result.shares[dtype] = max(fidelity.share for fidelity in measured)
        result.value_errors[dtype] = max(fidelity.output_error for fidelity in measured)
        gradients = [fidelity.gradient_error for fidelity in measured if fidelity.gradient_error is not None]
        if gradients:
            result.gradient_errors[dtype] = max(gradients)
    left_out = {name for names in result.left_out.values() for name in names}
    result.cases = sum(map(len, cases.values())) - len(left_out)
    for case in cases["float64"]:
        if case.smooth and case.excess is None and f"float64: {case.name}" not in left_out:
            result.gradchecks += _attempt(result, "gradcheck", case, _gradcheck) is not None
    return result


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run on so many threads. Those of plain torch are not what is tested, and on a machine that is busy with something
    else they wait for one another at every small step: minutes in all."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _attempt(result: Result, check: str, case: Case, function: Callable[[Case, str | None], T]) -> T | None:
    """What ``function`` returns; None, and an entry in ``result``, where the case cannot run or fails."""
    try:
        return function(case, None if result.backend == AUTO else result.backend)
    except Exception as error:  # whatever a kernel raises is its failure, and the next case runs
        if reason := _left_out_for(error):
            result.left_out.setdefault(reason, []).append(f"{check}: {case.name}")
        else:
            text = str(error) if isinstance(error, parity.Mismatch) else f"{type(error).__name__}: {error}"
            first = text.partition("\n\n")[0]  # gradcheck goes on with the whole Jacobians
            result.failures.append(Failure(check, case.name, " ".join(first.split())))
    return None


def _left_out_for(error: Exception) -> str | None:
    """Why a case is left out rather than failed; None where it failed."""
    if isinstance(error, BackendUnavailable):
        return str(error)
    missing = error.__cause__
    if isinstance(missing, ModuleNotFoundError) and str(missing.name).partition(".")[0] == "scipy":
        return "SciPy is not installed, and method='optimal' needs it; pip install 'mlot-kernels[optimal]'"
    return None


def _held_to_tolerance(case: Case, backend: str | None) -> parity.Fidelity:
    """``parity.fidelity`` of a loss, within ``losses.cases.tolerance``, too, which also bounds the reference itself."""
    measured = parity.fidelity(case, backend)
    shares = [measured.share]
    errors = measured.output_error, measured.gradient_error
    bounds = tolerance(case.inputs[0].dtype, case.roundings)
    for what, error, allowed in zip(("value", "gradient"), errors, bounds, strict=True):
        if error is None or not error <= allowed:
            raise parity.Mismatch(f"{what}: {error} off relative to float64, at most {allowed:.3g}")
        shares.append(error / allowed)
    return replace(measured, share=max(shares))


def _gradcheck(case: Case, backend: str | None) -> bool:
    parity.gradcheck(case, backend)
    return True  # _attempt returns None where it raises


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEVICES, help="where the inputs lie; by default cuda where there is a GPU")
    parser.add_argument("--backend", choices=BACKENDS, help="test this backend alone; by default all that can run")
    parser.add_argument(
        "--op",
        nargs="+",
        choices=SUBJECTS,
        default=(),
        metavar="NAME",
        help=f"test these operators and losses alone, of: {', '.join(SUBJECTS)}",
    )


def main(arguments: argparse.Namespace) -> int:
    """Test, print, and return the exit status: 0 all passed, 1 something failed, 2 nothing could be tested."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        coming = results(device, arguments.backend, arguments.op)
    except ValueError as error:
        print(f"selftest: {error}", file=sys.stderr)
        return 2
    found: list[Result] = []
    notes: dict[str, int] = {}

    def rows() -> Iterator[Row]:
        for result in coming:
            found.append(result)
            yield _row(result, notes)

    _print_table(f"On {device}; errors as a share of what is allowed", rows())
    for reason, number in notes.items():
        print(f"({number}) {reason}")
    for result in found:
        for failure in result.failures:
            print(f"FAILED: {result.subject} on {result.backend}, {failure.check}, {failure.case}: {failure.message}")
    if not any(result.cases for result in found):
        print("selftest: nothing could be tested; python -m mlot_kernels info says what can run", file=sys.stderr)
        return 2
    failures = sum(len(result.failures) for result in found)
    print(f"{failures} checks failed" if failures else "All checks passed")
    return 1 if failures else 0


def _row(result: Result, notes: dict[str, int]) -> Row:
    ran = str(result.cases)
    if result.left_out:
        numbers = ", ".join(str(notes.setdefault(reason, len(notes) + 1)) for reason in result.left_out)
        ran = f"{result.cases} of {result.cases + sum(map(len, result.left_out.values()))} ({numbers})"
    cells = [result.subject, result.backend, ran]
    for dtype in DTYPES:
        share = result.shares.get(dtype)
        cells.append("FAILED" if result.failed(dtype) else "-" if share is None else f"{share:.1%}")
    cells.append("FAILED" if result.failed("gradcheck") else "ok" if result.gradchecks else "-")
    return tuple(cells)


def _print_table(title: str, rows: Iterator[Row]) -> None:
    """Print each row as soon as it is there."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        _print_rich(title, rows)
    else:
        _print_plain(title, rows)


def _print_plain(title: str, rows: Iterator[Row]) -> None:
    widths = (max(map(len, SUBJECTS)), max(map(len, BACKENDS)), len("100 of 100 (1, 2)"), *map(len, HEADER[3:]))
    print(title)
    for row in itertools.chain((HEADER,), rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def _print_rich(title: str, rows: Iterator[Row]) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    table = Table(*HEADER, title=title)
    with Live(table):
        for row in rows:
            table.add_row(*(Text(cell, style="bold red" if cell == "FAILED" else "") for cell in row))
