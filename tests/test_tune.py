"""What tuning measures, what it chooses and what it writes, with a clock of our own in a GPU's place."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from mlot_kernels import triton_tiles, tune, verified
from mlot_kernels.__main__ import main
from mlot_kernels.triton_tiles import launch_options, overriding, parse
from mlot_kernels.tune import Call, Finding, Trial

CPU = torch.device("cpu")
SLOW, FAST, FASTER = ({"BLOCK": 64 << i, "num_warps": 4} for i in range(3))
DOCUMENT = {
    "format": 1,
    "kernels": {
        "ahead": {"default": SLOW, "candidates": [FAST, FASTER]},
        "back": {"default": SLOW, "candidates": [FAST]},
        "fixed": {"default": {"num_warps": 1}, "candidates": []},
    },
    "architectures": {},
}
FACTS = {"device": "a GPU", "torch": "2", "triton": "3"}


class Bench:
    """Calls that launch kernels by name, and a clock that takes its time from their tiles."""

    def __init__(self, **seconds):
        self.seconds = seconds  # kernel -> BLOCK -> seconds; what is missing takes a second
        self.launches = {}
        self.measured = []

    def call(self, name, *kernels, backward=False, results=lambda launches: [torch.ones(3)]):
        def run():
            self.launches = {kernel: launch_options(kernel, CPU) for kernel in kernels}
            return results(self.launches)

        return Call(name, run, backward)

    def clock(self, run):
        run()
        blocks = {kernel: launch.get("BLOCK") for kernel, launch in self.launches.items()}
        self.measured.append(blocks)
        return sum(self.seconds.get(kernel, {}).get(block, 1.0) for kernel, block in blocks.items())


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(triton_tiles, "TABLE", parse(copy.deepcopy(DOCUMENT)))


def test_the_fastest_is_chosen():
    bench = Bench(ahead={64: 1.0, 128: 0.8, 256: 0.5})
    (finding,) = tune.tune([bench.call("forward", "ahead", "fixed")], bench.clock)
    assert (finding.kernel, finding.calls) == ("ahead", 1)
    assert finding.trials == [Trial(FAST, pytest.approx(2 / 1.8)), Trial(FASTER, pytest.approx(2 / 1.5))]
    assert finding.chosen == finding.trials[1]


def test_the_speed_is_the_geometric_mean_over_the_calls():
    bench = Bench(ahead={64: 2.0, 128: 1.0, 256: 3.0})
    calls = [bench.call("one", "ahead"), bench.call("another", "ahead", "back")]
    finding = next(tune.tune(calls, bench.clock))
    assert finding.trials[0].speed == pytest.approx((2 / 1 * 3 / 2) ** 0.5)
    assert finding.chosen.options == FAST


@pytest.mark.parametrize(("seconds", "chosen"), [(1 / 1.02, None), (1 / 1.04, FAST)])
def test_the_default_stays_where_the_gain_is_within_the_margin(seconds, chosen):
    bench = Bench(ahead={128: seconds})
    (finding,) = tune.tune([bench.call("forward", "ahead")], bench.clock)
    assert (finding.chosen and finding.chosen.options) == chosen


def test_a_gain_that_does_not_come_again_is_luck():
    times = iter([1.0, 0.5, 1.0, 1.0, 0.99])  # the default, two candidates, and again the default and the best
    (finding,) = tune.tune([Bench().call("forward", "ahead")], lambda run: next(times))
    assert finding.trials[0].speed == 2
    assert finding.chosen is None


def test_the_slower_of_the_two_speeds_is_written_down():
    times = iter([1.0, 0.5, 1.0, 1.0, 0.8])
    (finding,) = tune.tune([Bench().call("forward", "ahead")], lambda run: next(times))
    assert finding.chosen == Trial(FAST, 1.25)


def test_one_kernel_is_tried_at_a_time_and_not_beside_an_entry_of_before():
    bench = Bench()
    with overriding({"back": FASTER}):
        list(tune.tune([bench.call("forward", "ahead", "back")], bench.clock))
    assert bench.measured[:3] == [{"ahead": block, "back": 64} for block in (64, 128, 256)]
    assert bench.measured[3:] == [{"ahead": 64, "back": block} for block in (64, 128)]


def test_a_kernel_is_timed_in_forward_where_that_launches_it():
    bench = Bench()
    calls = [bench.call("forward", "ahead"), bench.call("both", "ahead", "back", backward=True)]
    ahead, back = tune.tune(calls, bench.clock)
    assert (ahead.kernel, ahead.calls, back.kernel, back.calls) == ("ahead", 1, "back", 1)
    assert [set(measured) for measured in bench.measured] == 3 * [{"ahead"}] + 2 * [{"ahead", "back"}]


def slightly(launches):
    off = (1 + 2 * torch.finfo(torch.float32).eps) if launches["ahead"]["BLOCK"] == 256 else 1
    return [torch.tensor([0.1, float("nan"), -float("inf"), 1e-9 * off]), torch.ones(2, dtype=torch.bfloat16) * off]


def wrong(launches):
    return [torch.tensor([0.1, 1.0 + 1e-4 * (launches["ahead"]["BLOCK"] == 256)])]


def gone(launches):
    return [torch.tensor([1.0, float("nan") if launches["ahead"]["BLOCK"] == 256 else 1.0])]


def another_column(launches):
    return [torch.tensor([1, 3 if launches["ahead"]["BLOCK"] == 256 else 2])]


def fails(launches):
    if launches["ahead"]["BLOCK"] == 256:
        raise RuntimeError("out of resource:\n  shared memory")
    return []


@pytest.mark.parametrize(
    ("results", "problem"),
    [
        (slightly, None),
        (wrong, "call: AssertionError: Tensor-likes are not close!"),
        (gone, "call: AssertionError: Tensor-likes are not close!"),
        (another_column, "call: AssertionError: Tensor-likes are not equal!"),
        (fails, "call: RuntimeError: out of resource: shared memory"),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_what_fails_or_gives_another_result_is_out(results, problem):
    bench = Bench(ahead={64: 1.0, 128: 1.0, 256: 0.5})
    (finding,) = tune.tune([bench.call("call", "ahead", results=results)], bench.clock)
    if problem is None:
        assert finding.chosen.options == FASTER
    else:
        assert finding.chosen is None
        assert finding.trials[1].speed is None
        assert finding.trials[1].problem.startswith(problem)


def test_a_call_that_fails_with_the_defaults_is_an_error():
    with pytest.raises(RuntimeError, match="out of resource"):
        list(tune.tune([Call("call", lambda: fails({"ahead": FASTER}))], lambda run: 1.0))


def test_what_was_found_takes_the_place_of_what_was_there():
    document = copy.deepcopy(DOCUMENT)
    tune.enter(document, "sm_90", Finding("ahead", 1, [], Trial(FAST, 1.23456)), FACTS)
    tune.enter(document, "sm_90", Finding("back", 1, [], Trial(FAST, 2.0)), FACTS)
    tune.enter(document, "gfx942", Finding("back", 1, [], None), FACTS)
    assert document["architectures"]["sm_90"]["ahead"] == {"options": FAST, "speed": 1.235, **FACTS}
    tune.enter(document, "sm_90", Finding("ahead", 1, [], Trial(FASTER, 2.0)), FACTS)
    tune.enter(document, "sm_90", Finding("back", 1, [], None), FACTS)
    assert document["architectures"] == {"sm_90": {"ahead": {"options": FASTER, "speed": 2.0, **FACTS}}}
    assert parse(document).options("ahead", "sm_90") == FASTER
    tune.enter(document, "sm_90", Finding("ahead", 1, [], None), FACTS)
    assert document == DOCUMENT


def test_the_command_prints_what_it_finds_and_writes_it(monkeypatch, tmp_path, capsys):
    path, output = tmp_path / "triton_tiles.json", tmp_path / "found.json"
    path.write_text(tune.dumps(DOCUMENT))
    bench = Bench(ahead={256: 0.5})
    asked = []
    monkeypatch.setattr(tune, "PATH", path)
    monkeypatch.setattr(tune, "why_not", lambda: None)
    monkeypatch.setattr(tune, "on_gpu", bench.clock)
    monkeypatch.setattr(tune, "calls", lambda *x: asked.append(x) or [bench.call("forward", "ahead", "back")])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "some GPU")
    monkeypatch.setattr(verified, "_architectures", {1: "sm_90"})
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.9.0")
    assert main(["tune", "--operators", "row_entropy", "--output", str(output)]) == 0
    assert asked == [(["row_entropy"], "cuda:1")]
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith("sm_90 (some GPU), torch 2.")
    assert "ahead                       BLOCK 64, num_warps 4       default; calls: 1\n" in said
    assert "                            BLOCK 256, num_warps 4      1.333 chosen\n" in said
    assert said.endswith(f"written: {output}\n")
    assert path.read_text() == tune.dumps(DOCUMENT)
    entries = json.loads(output.read_text())["architectures"]
    assert entries == {
        "sm_90": {
            "ahead": {
                "options": FASTER,
                "speed": 1.333,
                "device": "some GPU",
                "torch": torch.__version__,
                "triton": "3.9.0",
            }
        }
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_needed():
    command = [sys.executable, "-m", "mlot_kernels.tune"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"tune: it needs a GPU, and torch {torch.__version__} sees none; run it on")


def test_what_is_missing_or_in_the_way_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["tune"]) == 2
    assert (
        "tune: it needs Triton, which is not installed; pip install 'mlot-kernels[triton]'" in capsys.readouterr().err
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert main(["tune", "--output", str(tmp_path / "nowhere/table.json")]) == 2
    assert "nowhere/table.json cannot be written; name another file with --output" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["tune"]) == 2
    assert "TRITON_INTERPRET=1 makes Triton interpret" in capsys.readouterr().err


def test_an_unknown_operator_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        main(["tune", "--operators", "pairwise_distance"])
    assert left.value.code == 2
    assert "invalid choice: 'pairwise_distance'" in capsys.readouterr().err
