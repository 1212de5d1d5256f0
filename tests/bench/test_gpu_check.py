"""The check that needs a GPU, as far as it can be run without one: its order, its limits, and what it derives."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_check, gpu_parts, gpu_verified, large_calls
from bench.gpu_check import Part
from mlot_kernels import BackendUnavailable, parity
from mlot_kernels.ops.row_entropy import reference
from mlot_kernels.registry import OPERATORS

FACTS = {"architecture": "sm_1", "versions": {"torch": "2", "triton": "3"}, "commit": {"id": "c"}, "date": "d"}


def python(name: str, code: str, seconds: float = 60, **options) -> Part:
    return Part(name, seconds, ("-c", code), **options)


def checked(out, *parts, minutes=9.0):
    outcomes = gpu_check.check(parts, out, minutes, FACTS)
    document = json.loads((out / "gpu_check.json").read_text())
    assert document["parts"] == [dataclasses.asdict(outcome) for outcome in outcomes]
    return outcomes


# What runs, in which order, for how long


def test_no_part_stops_the_next(tmp_path, capfd):
    outcomes = checked(
        tmp_path,
        python("fails", "print('so it ends'); raise SystemExit(3)"),
        python("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        python("skips", "print('no tool'); raise SystemExit(77)"),
        python("hangs", "import time; print('begun'); time.sleep(600)", seconds=2),
        python("passes", "print('x' * 4000)"),
    )
    assert [(o.name, o.status) for o in outcomes] == [
        ("fails", "failed"),
        ("crashes", "failed"),
        ("skips", "skipped"),
        ("hangs", "timed out"),
        ("passes", "ok"),
    ]
    assert [o.reason for o in outcomes] == ["exit status 3", "exit status -9", "no tool", "took more than 2 s", ""]
    assert outcomes[0].tail == "so it ends\n"
    assert outcomes[3].tail.startswith("begun\n")
    assert outcomes[4].tail == "x" * 2999 + "\n"
    assert "so it ends" in capfd.readouterr().out  # it was shown, too
    assert "hangs             timed out" in gpu_check.table(outcomes)


def test_results_are_there_after_each_part(tmp_path):
    code = f"import json; print([p['name'] for p in json.load(open({str(tmp_path / 'gpu_check.json')!r}))['parts']])"
    *_, last = checked(tmp_path, python("one", ""), python("two", "1 / 0"), python("three", code))
    assert last.tail == "['one', 'two']\n"


def running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_what_ignores_the_interrupt_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.2)
    code = (
        "import signal, subprocess; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '600']); print(child.pid); child.wait()"
    )
    (outcome,) = checked(tmp_path, python("deaf", code, seconds=3))
    assert outcome.status == "timed out"
    for _ in range(100):
        if not running(int(outcome.tail)):
            break
        time.sleep(0.1)
    assert not running(int(outcome.tail))


def test_what_does_not_fit_is_skipped_and_says_so(tmp_path):
    long, last = python("long", "", seconds=100_000), python("last", "")
    outcomes = checked(tmp_path, long, python("short", "", seconds=10), dataclasses.replace(last, seconds=10))
    assert [o.status for o in outcomes] == ["skipped", "ok", "ok"]
    assert outcomes[0].reason == "no longer fits into 9 minutes"
    # the last one's time is kept for it
    outcomes = checked(tmp_path, python("greedy", "", seconds=400), dataclasses.replace(last, seconds=440))
    assert [o.status for o in outcomes] == ["skipped", "ok"]
    assert [o.status for o in checked(tmp_path, last, minutes=0)] == ["skipped"]


def test_files_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path):
    for name in ("contract.xml", "notes"):
        (tmp_path / name).touch()
    checked(tmp_path, python("contract", "raise SystemExit(1)", leaves=("contract.xml",)))
    assert not (tmp_path / "contract.xml").exists()
    assert (tmp_path / "notes").exists()


def test_parts_do_not_see_a_backend_that_was_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MLOT_BACKEND", "triton")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    code = "import os; print(os.environ.get('MLOT_BACKEND'), os.environ['PYTHONPATH'].split(':')[-1]); import bench"
    (outcome,) = checked(tmp_path, python("environment", code))
    assert outcome.tail == "None /elsewhere\n"


@pytest.mark.parametrize(("code", "status"), [("", 0), ("raise SystemExit(77)", 0), ("1 / 0", 1)])
def test_the_exit_status(tmp_path, monkeypatch, capfd, code, status):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "facts", lambda: FACTS)
    monkeypatch.setattr(gpu_check, "parts", lambda: (python("one", code), python("two", "")))
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    assert gpu_check.main(["--out", str(tmp_path)]) == status
    assert "part              status      seconds\none " in capfd.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_check", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "gpu-check needs a GPU, and torch" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_contract_comes_first_of_the_tests_and_the_verdict_last():
    names = [part.name for part in gpu_check.parts()]
    assert names.index("contract") < names.index("tests")
    assert names[-1] == "verified"
    assert set(gpu_verified.REQUIRED) <= set(names)
    ours = {part.arguments[2] for part in gpu_check.parts() if part.arguments[1] == "bench.gpu_parts"}
    assert ours == set(gpu_parts.PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_part_runs_in_a_process_of_its_own(tmp_path):
    (part,) = (part for part in gpu_check.parts() if part.name == "selftest")
    outcome = gpu_check.run(part, tmp_path, 60)
    assert outcome.status == "failed"
    assert "torch finds no GPU here" in outcome.tail


# What the parts see


def test_a_bit_is_a_difference():
    x = torch.tensor([1.0, float("nan"), 0.0, -1.0])
    assert gpu_parts.difference(([x], [x.t()]), ([x.clone()], [x])) is None
    assert "output 0: 3 of 4 values differ" in gpu_parts.difference(([x], []), ([x - 1e-7], []))
    for i, value in ((0, 1.0000001), (2, -0.0)):
        other = x.clone()
        other[i] = value
        assert gpu_parts.difference(([], [x]), ([], [other])).startswith("gradient 0: ")
    assert "torch.float64 (4,), expected torch.float32 (4,)" in gpu_parts.difference(([x.double()], []), ([x], []))
    scalar = torch.tensor(1, dtype=torch.int64)
    assert gpu_parts.difference(([scalar, x[:0]], []), ([scalar + 0, x[:0]], [])) is None


@pytest.mark.parametrize("operator", OPERATORS)
def test_inputs_that_come_late_are_laid_out_alike(operator):
    def late(case, backend, upstream):
        inputs = gpu_parts.blank(case.inputs)
        assert all(x.isnan().all() for x in inputs)
        gpu_parts.fill(inputs, case.inputs)
        return gpu_parts.differentiated(case, backend, inputs, upstream)

    def never(case, backend, upstream):
        return gpu_parts.differentiated(case, backend, gpu_parts.blank(case.inputs), upstream)

    for case in parity.cases_of(OPERATORS[operator], torch.float32, "cpu"):
        assert gpu_parts._same_way(case, "reference", late) is None
        if case.counted is not None:
            assert gpu_parts._same_way(case, "reference", never) is not None


def large_offsets(monkeypatch, tmp_path, forward=reference.forward, backward=reference.backward):
    monkeypatch.setitem(OPERATORS["row_entropy"].forward, "cpu", forward)
    monkeypatch.setitem(OPERATORS["row_entropy"].backward, "cpu", backward)
    lines = gpu_parts.large_offsets(tmp_path, "cpu", elements=2**13, vocabulary=64)
    assert {line.operator for line in lines} == {operator for operator, _ in large_calls.CALLS.values()}
    return {(line.operator, line.backend): line.failure for line in lines}


def test_large_offsets_are_found_right(monkeypatch, tmp_path):
    failures = large_offsets(monkeypatch, tmp_path)
    assert failures[("row_entropy", "cpu")] is None
    assert set(failures.values()) == {None}


def test_offsets_that_wrap_are_found(monkeypatch, tmp_path):
    def wraps(values, index, *rest):
        return reference.forward(values, index % 50, *rest)

    def astray(*arguments):
        gradient, scale = reference.backward(*arguments)
        gradient[0, 3 % gradient.shape[1]] += gradient.shape[1] > 4
        return gradient, scale

    assert "output 0" in large_offsets(monkeypatch, tmp_path, forward=wraps)[("row_entropy", "cpu")]
    words = "64 elements of the gradient are not 0 where no row counts"
    assert large_offsets(monkeypatch, tmp_path, backward=astray)[("row_entropy", "cpu")] == words


def test_an_error_is_a_failure_and_a_refusal_is_none(capsys):
    def refuses():
        raise BackendUnavailable("too narrow")

    assert list(gpu_parts.judged("f", "triton", "case", refuses)) == []
    assert "f on triton, case: left out: too narrow" in capsys.readouterr().out
    (line,) = gpu_parts.judged("f", "triton", "case", lambda: 1 / 0)
    assert line.failure == "ZeroDivisionError: division by zero"
    (line,) = gpu_parts.judged("f", "triton", "case", lambda x: x, "differs")
    assert line.failure == "differs"


def test_lines_are_written_and_failures_shown(tmp_path, capsys):
    lines = [gpu_parts.Line("f", "triton", "case", failure) for failure in (None, "differs")]
    assert gpu_parts.report("large_offsets", lines, tmp_path) == 1
    assert "f on triton, case: differs\n2 checks, 1 failed" in capsys.readouterr().out
    assert gpu_verified.line_verdicts(tmp_path / "large_offsets.json") == {("f", "triton"): [True, False]}
    assert gpu_parts.report("large_offsets", lines[:1], tmp_path) == 0


@pytest.mark.parametrize(
    ("part", "said", "tool", "reason"),
    [
        ("install", (1, "error: externally-managed-environment"), None, "pip may not write"),
        ("install", (1, "error: no compiler"), None, None),
        ("memcheck", None, None, "compute-sanitizer is not installed"),
        ("memcheck", (1, "Device not supported"), "here", "refuses this device"),
        ("racecheck", (1, "a race"), "here", None),
        ("racecheck", (0, ""), "here", None),
    ],
)
def test_a_tool_that_cannot_run_is_no_failure(monkeypatch, tmp_path, capsys, part, said, tool, reason):
    monkeypatch.setitem(OPERATORS["row_entropy"].forward, "triton", len)
    monkeypatch.setattr(gpu_parts, "_shown", lambda *_, **__: said)
    monkeypatch.setattr(gpu_parts.shutil, "which", lambda _: tool)
    arguments = [part, "--out", str(tmp_path)]
    if reason is None and said[0]:
        with pytest.raises(SystemExit, match="ended with 1"):
            gpu_parts.main(arguments)
    else:
        assert gpu_parts.main(arguments) == (gpu_parts.SKIPPED if reason else 0)
        assert (reason or "0 failed") in capsys.readouterr().out.splitlines()[-1]


def test_a_tools_output_is_shown_and_kept(capsys):
    code = "import os; print(os.environ['MARK']); raise SystemExit(4)"
    assert gpu_parts._shown([sys.executable, "-c", code], MARK="here") == (4, "here\n")
    assert capsys.readouterr().out.endswith("here\n")
