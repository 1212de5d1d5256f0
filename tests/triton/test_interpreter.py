"""The Triton kernels' values on a CPU: the contract's promises of values, in a process where Triton interprets.

Triton decides at its import whether it interprets, so that this cannot be the process of the other tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlot_kernels.registry import OPERATORS
from tests.conftest import DEVICE, FULL

pytest.importorskip("triton", reason="the kernels are Triton's; pip install 'mlot-kernels[triton]'")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda", reason="where there is a GPU, the contract's tests run the kernels on it"
)

# Every program is a Python loop here, and takes milliseconds: the quick run has values, without float64 and many rows,
# and in 16 bits of the two cases with most in them, and of one operator torch's own checks, which look at what all
# backends share. `make test-full` has all.
QUICK = "fidelity and not many and (float32 or ((bfloat16 or float16) and (odd or every)))"
ALL = "fidelity or gradcheck or nan_shows or not_read or determinism or batch or composes or opcheck"
# Of an operator whose programs take long the quick run has these instead, which between them launch all of its kernels.
FEWER = {
    "row_entropy": f"opcheck or ({QUICK})",
    "sorted_l1": "fidelity and (tiles and (float32 or bfloat16) or float32 and every and both)",
    "row_divergence": (
        "fidelity and (float32 and (scales or floor and jsd or chosen and interpolated) or bfloat16 and every)"
    ),
}

# What `tune` does, but for the clock: every candidate of every kernel gives the default's results.
TUNE = """
import sys
import torch
from mlot_kernels import tune
from mlot_kernels.triton_tiles import TABLE

rows, vocabulary, *operators = sys.argv[1:]
sizes = dict(sequences=1, rows=int(rows), vocabulary=int(vocabulary))
calls = tune.calls(operators or tune.operators(), "cpu", dtypes=(torch.float32,), **sizes)
found = list(tune.tune(list(calls), lambda run: 1.0))
for finding in found:
    print("\\n".join(tune.lines(finding)))
assert {finding.kernel for finding in found} == {name for name, kernel in TABLE.kernels.items() if kernel.candidates}
assert all(trial.speed == 1 for finding in found for trial in finding.trials)
"""


def interpreted(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


OPS = Path(__file__).parents[1] / "ops"
# Tests of an operator's own that take every backend; of others the quick run has too many programs.
OWN = {
    "sinkhorn": "triton and (refuses or absorbs or nowhere or marginal_0 or (streams and random and 0.01))",
    "transport_cost": "triton and (refuses or width_0 or (sinkhorn and unrolled and l1))",
    "topk_softmax": "triton",
    "pairwise_cost": "triton and (special or empty or sign)",
    "match_columns": "triton and (index or nan or without)",
    "row_divergence": "triton and (several_pairs and jsd or many_equal and 0.6)",
    "sorted_l1": "triton and counted and crowded and stable and bfloat16",
    "soft_rank": "triton and (shorter or infinite or nan or refused)",
}


def test_losses_in_the_interpreter():
    done = interpreted("-m", "tests.losses.on_backend", "triton", *(["--full"] if FULL else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases agree" in done.stdout


@pytest.mark.parametrize("operator", [name for name, op in OPERATORS.items() if "triton" in op.forward])
def test_operators_in_the_interpreter(operator):
    chosen = f"{operator}-triton and ({ALL if FULL else FEWER.get(operator, QUICK)})"
    run_tests("tests/test_contract.py", chosen=chosen)


@pytest.mark.parametrize("operator", OWN)
def test_operators_own_tests_in_the_interpreter(operator):
    run_tests(*map(str, sorted(OPS.glob(f"test_{operator}*.py"))), chosen="triton" if FULL else OWN[operator])


def run_tests(*files, chosen):
    done = interpreted(
        "-m",
        "pytest",
        *files,
        f"-k={chosen}",
        "-pno:cacheprovider",
        "-pno:xdist",
        "--color=no",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout, done.stdout[-500:]
    assert "skipped" not in done.stdout, done.stdout[-500:]


def test_whatever_tune_may_choose_gives_the_same_results():
    few = ("1", "1500", "row_entropy", "topk_softmax", "rank_truncate", "pairwise_cost", "match_columns", "soft_rank")
    few += ("row_divergence",)
    done = interpreted("-c", TUNE, *(("2", "5000") if FULL else few))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
