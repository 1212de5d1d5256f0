"""C++ operators among threads and processes."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from mlot_kernels import row_entropy

# A DataLoader's worker is a fork of a process that may have used the operator, and sets its threads to 1 first.
FORK = """
import os, signal, torch
from mlot_kernels import row_entropy
torch.set_num_threads(2)
x = torch.randn(64, 1000)
expected = row_entropy(x, backend="cpu")
child = os.fork()
if child == 0:
    signal.alarm(30)  # a child that hangs ends here
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(row_entropy(x, backend="cpu"), expected) else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.fixture
def logits():
    return torch.randn(96, 5003)


def entropy_and_gradient(x):
    x = x.detach().requires_grad_()
    entropy = row_entropy(x, backend="cpu")
    return entropy.detach(), torch.autograd.grad(entropy.sum(), x)[0]


def test_a_child_with_one_thread_runs():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr


def test_several_python_threads_call_at_once(logits):
    expected = entropy_and_gradient(logits)
    start, found = threading.Barrier(4), []

    def work():
        start.wait()
        for _ in range(5):
            found.append(entropy_and_gradient(logits))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for result in found:
        assert all(torch.equal(ours, truth) for ours, truth in zip(result, expected, strict=True))


def test_python_runs_beside_a_call():
    """The dispatcher releases the interpreter's lock; else no other thread could get a word in during a call."""
    x, index = torch.randn(1, 2000, 5003), torch.arange(2000)[None]
    calls, done, seen = [0], threading.Event(), set()

    def watch():
        while not done.is_set():
            seen.add(calls[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(20):
        calls[0] += 1  # odd: a call runs
        torch.ops.mlot_cpu.row_entropy_forward(x, index, None, None, 1.0, False, 5003)
        calls[0] += 1
    done.set()
    watcher.join()
    assert any(number % 2 for number in seen)


def test_the_number_of_threads_is_honoured():
    """As the operating system counts those that the first call starts."""
    code = """
import os, sys, torch
from mlot_kernels import row_entropy
torch.set_num_threads(1)  # torch.ones would start some
x = torch.ones(512, 5003)
before = len(os.listdir("/proc/self/task"))
torch.set_num_threads(int(sys.argv[1]))
row_entropy(x, backend="cpu")
print(len(os.listdir("/proc/self/task")) - before)
"""
    runs = [subprocess.run([sys.executable, "-c", code, n], capture_output=True, text=True) for n in ("1", "3")]
    assert [run.stdout.strip() for run in runs] == ["0", "2"], runs


@pytest.mark.parametrize("offset", range(1, 9))
def test_where_a_row_starts_in_memory_changes_nothing(logits, offset):
    moved = torch.empty(logits.numel() + offset)[offset:].view_as(logits).copy_(logits)
    for ours, truth in zip(entropy_and_gradient(moved), entropy_and_gradient(logits), strict=True):
        assert torch.equal(ours, truth)
