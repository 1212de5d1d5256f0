"""Every launch that the operators make compiles for every architecture, without a GPU: specialised as a real launch is,
with every entry of the table of tile sizes, no stack, and within a budget of registers."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="it compiles the kernels; pip install 'mlot-kernels[triton]'")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mlot_kernels import (
    Logits,
    Ranked,
    Rows,
    gather_columns,
    match_columns,
    pairwise_cost,
    rank_truncate,
    row_divergence,
    row_entropy,
    sinkhorn,
    soft_rank,
    sorted_l1,
    token_log_probability,
    topk_softmax,
)
from mlot_kernels.ops.row_divergence.reference import KINDS
from mlot_kernels.transport import METRICS
from mlot_kernels.triton_tiles import TABLE, Options, overriding
from tests.conftest import FULL

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ARCHITECTURES = ["sm_90"] + ["sm_80", "sm_100", "sm_120", "gfx942"] * FULL
TABLES = {f"{architecture}, default": (architecture, {}) for architecture in ARCHITECTURES}
TABLES |= {f"{architecture}, its own": (architecture, entries) for architecture, entries in TABLE.architectures.items()}
CANDIDATES = max(len(kernel.candidates) for kernel in TABLE.kernels.values())
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64) if FULL else (torch.float32, torch.bfloat16)

# float64, which serves gradcheck, is exempt. Triton 3.6 keeps more values alive: 142 registers in one kernel, and one
# value of another on the stack.
NEW = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
REGISTERS, STACK = (128, 0) if NEW else (160, 16)

RESIDENT = 224  # of a whole problem and its scalings, which these hold on purpose, a few warps to a program
VOCABULARIES = [(151_936, 151_936), (50_257, 50_257), (151_665, 151_936)]  # columns, and the stride of rows
FEATURES = [(256, 256, 50), (1, 37, 1)]  # rows of either side, and their width
# A gradient, and sides: what one program holds, or goes through; tiles of whole rows, and of all of a slab's.
TRANSPORTS = [
    ("unrolled", 64, 64),
    ("unrolled", 128, 128),
    ("unrolled", 256, 256),
    ("unrolled", 300, 1100),
    ("envelope", 256, 256),
]
if FULL:
    sides = ((5, 3), (128, 32), (1000, 1), (2000, 1), (16, 1000), (7, 250), (50, 60), (2500, 1024))
    TRANSPORTS += [("unrolled", M, N) for M, N in sides]

# They read whole rows of logits, and load vectors wherever the rows' stride lets them.
WALKS = {
    "rows.statistics",
    "row_entropy.forward",
    "row_entropy.backward",
    "rank_truncate.partial_sums",
    "select.group_maxima",
    "gradient.write_dense",
    "sorted_l1.backward",
    "row_divergence.mix",
    "row_divergence.forward",
    "row_divergence.backward",
}


class Offline:
    """Stands in for a GPU's driver: names a target, launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def name_of(kernel: JITFunction) -> str:
    """As in the table: ``<module or operator>.<function>``."""
    module = kernel.__module__.split(".")
    owner = module[2] if module[1] == "ops" else module[-1].removeprefix("triton_")
    return f"{owner}.{kernel.__name__.removeprefix('_')}"


@pytest.fixture
def compile_only(monkeypatch):
    """``with compile_only(target) as kernels``: launches in the block compile for ``target``, into ``kernels``."""
    run = JITFunction.run

    @contextlib.contextmanager
    def block(target: GPUTarget) -> Iterator[list[tuple[str, Any]]]:
        kernels: list[tuple[str, Any]] = []

        def record(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            assert "enable_fp_fusion" in options, f"{self.__name__}: fusion is left to a default"
            self.device_caches.clear()  # keyed by device, not by target
            kernels.append((name_of(self), run(self, *arguments, grid=grid, warmup=True, **options)))

        monkeypatch.setattr(JITFunction, "run", record)
        monkeypatch.setattr(driver, "_active", Offline(target))  # reset_active() raises where there is no GPU
        yield kernels

    return block


def entropy(logits):
    return row_entropy(logits, backend="triton")


def token(logits):
    return token_log_probability(logits, torch.zeros_like(logits.rows.index), backend="triton")


def top(logits):
    result = topk_softmax(logits, k=50, backend="triton")
    return result.log_probabilities.sum() + result.lse.sum()


def ranked(logits):
    return rank_truncate(logits, k=50, also_at=(2.0,), backend="triton").log_probabilities


def ranked_each_row(logits):
    return rank_truncate(logits, k=50, scope="token", backend="triton").kept_mass


def gathered(logits):
    columns = torch.zeros(logits.values.shape[0], 7, dtype=torch.int64)
    return gather_columns(logits, columns, backend="triton").log_probabilities


def matched(logits):
    teacher = torch.zeros(*logits.rows.index.shape, 50)
    ranks = Ranked(teacher[None], torch.zeros(teacher.shape[0], 50, dtype=torch.int64), teacher.sum(-1))
    return match_columns(logits, ranks, backend="triton")


def compared(logits):
    teacher = logits.values.detach()[..., :32_000]
    return sorted_l1(logits, teacher, top_k=None if logits.columns is None else 1000, backend="triton")


def compared_stably(logits):
    return sorted_l1(logits, logits.values.detach()[..., :32_000].float(), ties="stable", backend="triton")


def diverging(kind: str, at_pairs: bool = False, **options: Any) -> Callable[[Logits], torch.Tensor]:
    """A call that also asks for the teacher's gradient."""

    def call(logits):
        teacher = replace(logits, values=logits.values.detach().requires_grad_())
        pairs = torch.zeros(1000, 2, dtype=torch.int64) if at_pairs else None
        return row_divergence(logits, teacher, kind=kind, column_pairs=pairs, backend="triton", **options)

    call.__name__ = f"diverged_{kind}" + "_at_pairs" * at_pairs + "".join(f"_{name}" for name in options)
    return call


CALLS = (entropy, token, top, ranked, ranked_each_row, gathered, matched)
# They take longest to compile, and have one vocabulary.
DIVERGED = diverging("jsd")
PAIRED = [compared, DIVERGED]
ALL_PAIRED = [compared_stably, diverging("adaptive_kl", at_pairs=True), diverging("forward_kl", interpolation=0.5)]
FLOORED = [diverging("jsd", at_pairs=True, floor=1e-8), diverging("skew_kl", floor=1e-8)]
if FULL:
    PAIRED += ALL_PAIRED + FLOORED
    PAIRED += [diverging(kind) for kind in KINDS if kind != "jsd"]
    PAIRED += [diverging(kind, at_pairs=True) for kind in KINDS if kind != "adaptive_kl"]


def on_logits(
    call: Callable[[Logits], torch.Tensor],
    dtype: torch.dtype,
    plain: bool = False,
    V: int = VOCABULARIES[0][0],
    stride: int = VOCABULARIES[0][1],
) -> None:
    """Call it, and its gradient if it has one."""
    values = torch.zeros(1, 2, stride, dtype=dtype)[..., :V].requires_grad_()
    logits = Logits(values, Rows.every(1, 2))
    if not plain:
        columns = torch.ones(V, dtype=torch.bool)
        logits = Logits(values, Rows.every(1, 2), 0.7, True, V - 1, columns, torch.zeros(1, 2))
    output = call(logits)
    if output.is_floating_point():
        output.sum().backward()


def on_features(metric: str, dtype: torch.dtype, M: int = 256, N: int = 256, D: int = 50) -> None:
    x, y = (torch.zeros(2, rows, D, dtype=dtype, requires_grad=True) for rows in (M, N))
    pairwise_cost(x, y, metric=metric, backend="triton").sum().backward()


def on_costs(gradient: str, dtype: torch.dtype, M: int = 64, N: int = 64, plain: bool = True) -> None:
    options: dict[str, Any] = {}
    if not plain:
        options = {
            "marginals": (torch.ones(2, M), torch.ones(2, N)),
            "row_lengths": torch.ones(2, dtype=torch.int64),
            "column_lengths": torch.ones(2, dtype=torch.int32),
            "column_weight": torch.ones(2, N),
            "tolerance": 1e-3,
        }
    cost = torch.zeros(2, M, N, dtype=dtype, requires_grad=True)
    whole = not plain and gradient == "unrolled"
    solved = sinkhorn(cost, iterations=3, gradient=gradient, return_plan=whole, backend="triton", **options)
    (solved.regularized_cost.sum() + (solved.plan.sum() if whole else 0)).backward()


def on_ranks(width: int, dtype: torch.dtype, counted: bool = True) -> None:
    values = torch.zeros(3, width, dtype=dtype, requires_grad=True)
    lengths = torch.ones(3, dtype=torch.int64) if counted else None
    soft_rank(values, lengths, backend="triton").sum().backward()


def resources(cubin: bytes, path: Path) -> dict[str, int]:
    path.write_bytes(cubin)
    text = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def target_of(architecture: str) -> GPUTarget:
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


@pytest.fixture
def check(compile_only, tmp_path, monkeypatch):
    """Compiles what ``run`` launches, with ``entries`` of the table, and holds it to the budget; returns the names.

    ``vectors`` names the kernels that must load more than one element at a time.
    """
    monkeypatch.setattr("mlot_kernels.backends._INTERPRETED", True)  # lets the backend take tensors of the CPU
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # some hundred megabytes

    def check(
        architecture: str,
        entries: Mapping[str, Options],
        dtype: torch.dtype,
        run: Callable[[], None],
        vectors: Collection[str] = (),
    ) -> set[str]:
        target = target_of(architecture)
        with overriding(entries) as launched, compile_only(target) as kernels:
            run()
        assert kernels
        assert {name for name, _ in kernels} == launched, "a launch asks for another kernel's options"
        for name, kernel in kernels:
            if target.backend == "hip":
                assert kernel.asm["hsaco"], name
                continue
            used = resources(kernel.asm["cubin"], tmp_path / f"{name}.cubin")
            if dtype != torch.float64:
                assert used["STACK"] <= STACK, (name, used)
                assert used["LOCAL"] == 0, (name, used)
                assert used["REG"] <= (RESIDENT if "resident" in name else REGISTERS), (name, used)
            if name in vectors:
                assert re.search(r"ld\.global[.\w:]*\.v[24]\.", kernel.asm["ptx"]), f"{name} loads single elements"
        return launched

    return check


def walks(V: int, stride: int) -> set[str]:
    """The kernels that can load vectors of such rows."""
    return set() if stride % 16 else WALKS if stride == V else WALKS - {"gradient.write_dense"}


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "every field"])
@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("architecture", "entries"), TABLES.values(), ids=TABLES)
@pytest.mark.parametrize(("V", "stride"), VOCABULARIES)
def test_launches_compile_within_budget(V, stride, architecture, entries, dtype, call, plain, check):
    check(architecture, entries, dtype, lambda: on_logits(call, dtype, plain, V, stride), walks(V, stride))


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "every field"])
@pytest.mark.parametrize("call", PAIRED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("architecture", "entries"), TABLES.values(), ids=TABLES)
def test_launches_on_pairs_compile_within_budget(architecture, entries, dtype, call, plain, check):
    V, stride = VOCABULARIES[-1]
    vectors = walks(V, stride) - ({"row_divergence.forward"} if "at_pairs" in call.__name__ else set())
    check(architecture, entries, dtype, lambda: on_logits(call, dtype, plain, V, stride), vectors)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("architecture", "entries"), TABLES.values(), ids=TABLES)
@pytest.mark.parametrize(("M", "N", "D"), FEATURES)
def test_launches_on_features_compile_within_budget(M, N, D, architecture, entries, dtype, metric, check):
    vectors = {"pairwise_cost.costs", "pairwise_cost.gradient"} - (
        {*TABLE.kernels} if dtype == torch.float64 else set()
    )
    check(architecture, entries, dtype, lambda: on_features(metric, dtype, M, N, D), vectors)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "every option"])
@pytest.mark.parametrize(("gradient", "M", "N"), TRANSPORTS)
@pytest.mark.parametrize("dtype", DTYPES if FULL else DTYPES[:1], ids=str)
@pytest.mark.parametrize(("architecture", "entries"), TABLES.values(), ids=TABLES)
def test_launches_on_costs_compile_within_budget(architecture, entries, dtype, gradient, M, N, plain, check):
    check(architecture, entries, dtype, lambda: on_costs(gradient, dtype, M, N, plain))


@pytest.mark.parametrize("width", [20, 64] + [5, 16, 33] * FULL)
@pytest.mark.parametrize("dtype", DTYPES if FULL else DTYPES[:1], ids=str)
@pytest.mark.parametrize(("architecture", "entries"), TABLES.values(), ids=TABLES)
def test_launches_on_ranks_compile_within_budget(architecture, entries, dtype, width, check):
    check(architecture, entries, dtype, lambda: on_ranks(width, dtype, width != 20 or FULL))


def candidates(i: int) -> Mapping[str, Options]:
    return {name: kernel.candidates[i] for name, kernel in TABLE.kernels.items() if i < len(kernel.candidates)}


@pytest.mark.parametrize("call", [*CALLS, DIVERGED], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("i", range(CANDIDATES if FULL else 0))
def test_what_tune_may_choose_compiles_within_budget(i, architecture, dtype, call, check):
    check(architecture, candidates(i), dtype, lambda: on_logits(call, dtype), walks(*VOCABULARIES[0]))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("i", range(CANDIDATES if FULL else 0))
def test_what_tune_may_choose_on_features_compiles_within_budget(i, architecture, metric, check):
    check(architecture, candidates(i), torch.float32, lambda: on_features(metric, torch.float32))


@pytest.mark.parametrize("width", [20, 64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("i", range(CANDIDATES if FULL else 0))
def test_what_tune_may_choose_on_ranks_compiles_within_budget(i, architecture, width, check):
    check(architecture, candidates(i), torch.float32, lambda: on_ranks(width, torch.float32))


def test_the_calls_launch_every_kernel_of_the_table(check):
    def run():
        for call in (*CALLS, compared, *ALL_PAIRED):
            on_logits(call, torch.float32)
        for metric in METRICS:
            on_features(metric, torch.float32)
        for gradient, *sides in TRANSPORTS:
            for plain in (True, False):
                on_costs(gradient, torch.float32, *sides, plain=plain)
        on_ranks(20, torch.float32)

    assert check("sm_90", {}, torch.float32, run) == set(TABLE.kernels)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"BLOCK": 8192, "num_warps": 4}, "rows.statistics.*(REG|STACK)"),
        ({"BLOCK": 256, "num_warps": 8}, "single elements"),
    ],
)
def test_an_entry_beyond_the_budget_is_found(entry, words, check):
    with pytest.raises(AssertionError, match=words):
        check("sm_90", {"rows.statistics": entry}, torch.float32, lambda: on_logits(token, torch.float32), WALKS)
