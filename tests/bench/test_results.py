"""What a run of the benchmarks leaves."""

import json

import pytest

pytest.importorskip("pytest_benchmark", reason="the benchmarks are timed by pytest-benchmark")

from bench import results
from bench.check import Errors

IDENTITY = {
    "subject": "row_entropy",
    "contender": "reference",
    "size": {"sequences": 2, "rows": 32, "vocabulary": 100},
    "dtype": "float32",
    "direction": "both",
    "device": "cpu",
    "threads": 2,
}
SETTINGS = {"suite": "quick", "device": "cpu", "turns": 2}


def collected(*turns):
    found = results.Collected()
    for seconds in turns:
        found.add(IDENTITY, seconds, ours=True, input_sets=3, traffic=100, logits=50, errors=Errors(1e-7, 2e-7))
    return found


def test_turns_are_pooled():
    found = collected([1.0, 2.0], [3.0, 4.0, 5.0])
    found.remember(IDENTITY, 1234)
    (entry,) = found.finished()
    assert entry["seconds"] == {"median": 3.0, "lower": 2.0, "upper": 4.0, "rounds": 5}
    assert entry["memory"] == 1234
    assert entry["errors"] == {"value": 1e-7, "gradient": 2e-7}
    assert {name: entry[name] for name in results.IDENTITY} == IDENTITY


@pytest.mark.parametrize("measured_before", [True, False])
def test_a_failed_entry_has_no_time(measured_before):
    found = collected([1.0, 2.0]) if measured_before else results.Collected()
    found.fail(IDENTITY, "the reference check failed: output 0")
    (entry,) = found.finished()
    assert entry["seconds"] is None
    assert entry["failure"] == "the reference check failed: output 0"


def test_one_round_has_no_spread():
    (entry,) = collected([1.0]).finished()
    assert entry["seconds"] == {"median": 1.0, "lower": 1.0, "upper": 1.0, "rounds": 1}


def test_the_run_before_is_kept(tmp_path):
    path = tmp_path / "deeper" / "machine.json"
    results.write(path, collected([1.0, 2.0, 3.0]), SETTINGS)
    first = json.loads(path.read_text())
    assert first["previous"] is None
    assert first["format"] == results.FORMAT
    assert first["versions"]["torch"]
    assert first["command"] == "make bench"
    results.write(path, collected([2.0, 3.0, 4.0]), {**SETTINGS, "suite": "full"})
    second = json.loads(path.read_text())
    assert second["command"] == "make bench-full"
    assert second["previous"]["settings"] == SETTINGS
    assert second["previous"]["results"] == [
        {**IDENTITY, "seconds": {"median": 2.0, "lower": 1.5, "upper": 2.5, "rounds": 3}}
    ]
    results.write(path, collected([5.0]), SETTINGS)
    assert json.loads(path.read_text())["previous"]["results"][0]["seconds"]["median"] == 3.0
