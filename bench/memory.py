"""The most memory that a measurement holds beyond its inputs."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import multiprocessing.connection
from pathlib import Path

import torch

from bench.measure import Run, contender, inputs, runs
from bench.suite import Measurement


def peak(measurement: Measurement) -> int:
    """Bytes, the gradient included.

    On a GPU the allocator's count. On a CPU the resident set of a process of its own, which sees what C++ allocates and
    what the allocator keeps back, too.

    Raises:
        OSError: this system does not tell (it takes Linux's /proc).
    """
    if measurement.device == "cuda":
        run = _prepared(measurement)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.memory"])  # with torch: imported once, not in every process
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, measurement.identity))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise OSError(f"the process that measures {measurement} died") from None
    finally:
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _prepared(measurement: Measurement) -> Run:
    (run,) = runs(contender(measurement), measurement, [inputs(measurement, 0)])
    run()  # libraries, threads, compilers and lasting workspaces are not the call's
    return run


def _child(sender: multiprocessing.connection.Connection, identity: dict) -> None:
    try:
        suite = importlib.import_module(f"bench.bench_{identity['subject']}").SUITE
        dtype = getattr(torch, identity["dtype"])
        size = tuple(identity["size"].items())
        torch.set_num_threads(identity["threads"])
        run = _prepared(
            Measurement(suite, identity["contender"], size, dtype, identity["direction"], "cpu", identity["threads"])
        )
        ctypes.CDLL(None).malloc_trim(0)  # freed heap would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
        before = _status("VmRSS")
        run()
        sender.send(_status("VmHWM") - before)
    except Exception as error:
        sender.send(error)


def _status(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
