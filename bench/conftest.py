"""``pytest bench``: what is measured, in which order, and where the results go.

Every measurement is taken in several turns, all of them once before any a second time, so that the machine's slow moods
are in the spread that is reported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import machine, memory, results
from bench.check import CheckFailed, check
from bench.measure import captured, contender, device_clock, in_turn, rounds_of, runs, sets_of_inputs
from bench.suite import Measurement, nbytes, plan
from mlot_kernels import BackendUnavailable

TURNS = 3
COLLECTED = pytest.StashKey[results.Collected]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mlot_kernels")
    group.addoption("--suite", choices=("quick", "full"), default="quick", help="how much to measure")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--results", type=Path, metavar="FILE", help="write the results there, for bench.report")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COLLECTED] = results.Collected()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind, device = metafunc.config.getoption("suite"), metafunc.config.getoption("device")
    cores = os.cpu_count() or 1
    found = list(
        machine.plan(device, cores)
        if "rate" in metafunc.fixturenames
        else plan(metafunc.module.SUITE, kind, device, cores)
    )
    name = "rate" if "rate" in metafunc.fixturenames else "measurement"
    metafunc.parametrize("turn", range(TURNS))
    metafunc.parametrize(name, found, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.callspec.params["turn"])  # type: ignore[attr-defined]
    if config.getoption("device") == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=device_clock))


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """As many as the measurement says."""
    before = torch.get_num_threads()
    params = request.node.callspec.params
    torch.set_num_threads((params.get("measurement") or params["rate"]).threads or before)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def collected(request: pytest.FixtureRequest) -> results.Collected:
    return request.config.stash[COLLECTED]


@pytest.fixture
def take(request: pytest.FixtureRequest, benchmark, collected: results.Collected, turn: int):
    """A function that takes a measurement."""
    kind = request.config.getoption("suite")

    def take(measurement: Measurement) -> None:
        suite = measurement.suite
        benchmark.group = f"{suite.subject}, {measurement.direction}"
        try:
            call = contender(measurement)
            errors = check(measurement)
        except BackendUnavailable as error:
            pytest.skip(str(error))
        except CheckFailed as error:
            collected.fail(measurement.identity, str(error))
            pytest.fail(str(error))
        sets = sets_of_inputs(measurement)
        functions = runs(call, measurement, sets)
        in_graph = measurement.device == "cuda" and not (measurement.peer and measurement.peer.waits)
        run = captured(functions) if in_graph else in_turn(functions)
        rounds, repetitions = rounds_of(run, kind, benchmark._timer)
        benchmark.pedantic(run, rounds=rounds, iterations=repetitions)
        calls = len(functions) if in_graph else 1
        collected.add(
            measurement.identity,
            [seconds / calls for seconds in benchmark.stats.stats.data],
            ours=measurement.peer is None,
            input_sets=len(sets),
            traffic=measurement.traffic(*sets[0]),
            logits=nbytes(*sets[0][: suite.logits]) or None,
            errors=errors,
        )
        if turn == 0 and measurement.whole:
            collected.remember(measurement.identity, memory.peak(measurement))

    return take


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, collected = session.config.getoption("results"), session.config.stash[COLLECTED]
    if path is None:
        return
    if not collected.entries:
        raise pytest.UsageError(f"nothing was measured, so nothing is written to {path}")
    settings = {"suite": session.config.getoption("suite"), "device": session.config.getoption("device")}
    results.write(path, collected, {**settings, "turns": TURNS})
    print(f"\nresults: {path}")
