"""What is run for one measurement, on which inputs, and for how long."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.baselines.compiled import compiled
from bench.machine import cache_size
from bench.suite import Measurement, Outputs, nbytes
from mlot_kernels.parity import upstream_of

MOST_SETS = 8
SECONDS_PER_TURN = {"quick": 0.25, "full": 1.5}
ROUNDS = {"quick": (2, 15), "full": (5, 50)}
SHORTEST_ROUND = 2e-3  # seconds; what is shorter is repeated within a round
MOST_WARM_UPS = 12

Run = Callable[[], Any]


def contender(measurement: Measurement) -> Callable[..., Outputs]:
    """The function of the inputs that is measured; skips where its package is missing."""
    name, peer = measurement.contender, measurement.peer
    if peer is None:
        return functools.partial(measurement.suite.ours, backend=None if name == "auto" else name)
    if peer.needs is not None and importlib.util.find_spec(peer.needs) is None:
        pytest.skip(f"the peer {name} needs {peer.needs}, which is not installed")
    return compiled(peer.call) if peer.compiled else peer.call


def inputs(measurement: Measurement, seed: int) -> tuple[Tensor, ...]:
    tensors = measurement.suite.inputs(measurement.dtype, measurement.device, seed, **dict(measurement.size))
    asked = measurement.suite.leaves if measurement.direction != "forward" else ()
    return tuple(x.requires_grad_(i in asked) if x.is_floating_point() else x for i, x in enumerate(tensors))


def sets_of_inputs(measurement: Measurement) -> list[tuple[Tensor, ...]]:
    """So many that none is found in the last-level cache when its turn comes."""
    asked = measurement.suite.leaves if measurement.direction != "forward" else ()
    drawn = _drawn(replace(measurement, contender="", direction="forward", threads=None))
    if asked:  # each is read, read again and written
        drawn = drawn[: len(drawn) // 3 + 1]
    return [tuple(x.detach().requires_grad_(i in asked) for i, x in enumerate(tensors)) for tensors in drawn]


@functools.lru_cache(maxsize=1)  # measurements of one size and dtype follow one another
def _drawn(measurement: Measurement) -> list[tuple[Tensor, ...]]:
    first = inputs(measurement, 0)
    count = min(MOST_SETS, math.ceil(2 * cache_size(measurement.device) / nbytes(*first)) + 1)
    return [first, *(inputs(measurement, seed) for seed in range(1, count))]


def runs(call: Callable[..., Outputs], measurement: Measurement, sets: list[tuple[Tensor, ...]]) -> list[Run]:
    """For each set of inputs the part of the call that the direction names.

    The gradient is fresh memory every time, as in training.
    """

    def backward(outputs: Outputs, tensors: tuple[Tensor, ...], weights: list[Tensor], again: bool) -> Any:
        asked = [tensors[i] for i in measurement.suite.leaves]
        return torch.autograd.grad(outputs, asked, weights, retain_graph=again)

    def both(tensors: tuple[Tensor, ...], weights: list[Tensor]) -> Any:
        return backward(call(*tensors), tensors, weights, False)

    if measurement.direction == "forward":
        return [functools.partial(call, *tensors) for tensors in sets]
    outputs = call(*sets[0])
    weights = upstream_of(outputs)
    if measurement.direction == "both":
        return [functools.partial(both, tensors, weights) for tensors in sets]
    graphs = [outputs, *(call(*tensors) for tensors in sets[1:])]
    return [functools.partial(backward, *each, weights, True) for each in zip(graphs, sets, strict=True)]


def in_turn(functions: list[Run]) -> Run:
    """The next of them at every call."""
    turns = itertools.cycle(functions)
    return lambda: next(turns)()


def captured(functions: list[Run]) -> Run:
    """All of them, one after the other, as one CUDA graph: what the device needs, without the host's launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    return graph.replay


def device_clock() -> float:
    """Seconds, read once the GPU has done all that was asked of it."""
    torch.cuda.synchronize()
    return time.perf_counter()


def rounds_of(run: Run, kind: str, clock: Callable[[], float]) -> tuple[int, int]:
    """Warm up, and see how many rounds, and repetitions within one, fit into a turn; more where times scatter.

    Warm is when a call takes no less than the ones before: a virtual machine may give memory back to its host, and the
    first calls that get it again take many times as long.
    """
    run()
    budget = SECONDS_PER_TURN[kind]
    warming = [_timed(run, clock)]
    while len(warming) < MOST_WARM_UPS and sum(warming) < 2 * budget:
        warming.append(_timed(run, clock))
        if len(warming) >= 3 and min(warming[-2:]) > 0.8 * min(warming[:-2]) and warming[-1] < 1.5 * min(warming):
            break
    times = warming[-3:]
    typical = statistics.median(times)
    repetitions = max(1, math.ceil(SHORTEST_ROUND / typical))
    fewest, most = ROUNDS[kind]
    rounds = min(most, max(fewest, math.ceil(budget / (typical * repetitions))))
    return (2 * rounds if max(times) - min(times) > 0.3 * typical else rounds), repetitions


def _timed(run: Run, clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start
