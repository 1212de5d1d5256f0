"""Every benchmark's contenders agree, at small sizes; and nothing wrong gets a time."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the benchmarks are timed by pytest-benchmark")

import bench
from bench import memory
from bench.check import CheckFailed, check
from bench.measure import runs, sets_of_inputs
from bench.suite import DIRECTIONS, Measurement, Peer, nbytes, plan
from bench.targets import load
from mlot_kernels.registry import OPERATORS

SUBJECTS = sorted(
    path.stem.removeprefix("bench_")
    for path in Path(bench.__path__[0]).glob("bench_*.py")
    if path.stem != "bench_machine"
)
SMALL = {
    "sequences": 2,
    "rows": 5,
    "vocabulary": 301,
    "student_vocabulary": 301,
    "teacher_vocabulary": 257,
    "k": 9,
    "problems": 2,
    "student_rows": 12,
    "teacher_rows": 9,
    "width": 60,
}


def suite_of(subject):
    return importlib.import_module(f"bench.bench_{subject}").SUITE


def small(suite, contender, **fields):
    size = tuple((name, SMALL[name]) for name in suite.sizes["quick"][0])
    direction = "both" if suite.leaves else "forward"
    return replace(Measurement(suite, contender, size, torch.float32, direction, "cpu", 1), **fields)


def test_every_operator_and_loss_is_measured():
    assert set(OPERATORS) <= set(SUBJECTS)
    for subject in SUBJECTS:
        assert suite_of(subject).subject == subject


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_contenders_agree(subject, dtype):
    suite = suite_of(subject)
    eager = [name for name, peer in suite.peers.items() if not peer.compiled and peer.needs is None]
    for contender in (*suite.backends, *eager):
        if contender in ("triton", "cuda"):  # they need a GPU, where bench/gpu_check.py measures and judges them
            continue
        errors = check(small(suite, contender, dtype=dtype))
        peer = suite.peers.get(contender)
        free = peer is not None and (peer.inexact is not None or (peer.sorts and dtype == torch.bfloat16))
        assert (errors.gradient is None) == (not suite.leaves or free)


@pytest.mark.parametrize(
    ("subject", "contender"),
    [(subject, name) for subject in SUBJECTS for name, peer in suite_of(subject).peers.items() if peer.needs],
)
def test_packages_agree(subject, contender):
    suite = suite_of(subject)
    pytest.importorskip(suite.peers[contender].needs, reason=f"the peer {contender} is that package")
    check(small(suite, contender))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_compiled_peers_compile_whole(subject):
    suite = suite_of(subject)
    for name, peer in suite.peers.items():
        if peer.compiled:
            whole = torch.compile(peer.call, fullgraph=True, backend="eager")
            inputs = suite.inputs(torch.float32, "cpu", 0, **dict(small(suite, name).size))
            for y, expected in zip(whole(*inputs), peer.call(*inputs), strict=True):
                torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("wrong", ["output", "gradient", "nan", "shape"])
def test_a_wrong_contender_fails(wrong):
    suite = suite_of("row_entropy")

    def call(logits):
        (entropy,) = suite.peers["eager"].call(logits)
        if wrong == "output":
            return (entropy * 1.01,)
        if wrong == "gradient":
            return (entropy.detach() * 1.01 + 0 * entropy - entropy.detach() * 0.01,)
        return (entropy * float("nan") if wrong == "nan" else entropy[:1],)

    broken = replace(suite, peers={"broken": Peer(call)})
    with pytest.raises(CheckFailed, match="gradient 0" if wrong == "gradient" else "output 0"):
        check(small(broken, "broken"))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_plans(subject):
    suite = suite_of(subject)
    quick, full = (list(plan(suite, kind, "cpu", 2)) for kind in ("quick", "full"))
    identities = [str(m.identity) for m in full]
    assert len(set(identities)) == len(identities)
    assert len(quick) < len(full)
    assert {m.direction for m in quick} == set(DIRECTIONS if suite.leaves else ("forward",))
    assert {m.threads for m in quick} == {1, 2}
    assert {m.contender for m in full} == {*suite.backends, *suite.peers}
    in_quick = {name for name, peer in suite.peers.items() if not peer.only_full}
    assert {m.contender for m in quick} == {*suite.backends, *in_quick}
    assert len(set(quick)) == len(quick)
    assert all(m.threads is None for m in plan(suite, "quick", "cuda", 2))
    assert {m.threads for m in plan(suite, "quick", "cpu", 1)} == {1}


@pytest.mark.parametrize("target", [target for target in load() if target.device == "cpu"], ids=lambda t: t.name)
def test_the_quick_suite_can_judge_every_target(target):
    suite = suite_of(target.subject)
    measured = [
        m.contender
        for m in plan(suite, "quick", "cpu", 2)
        if (str(m.dtype), m.direction, m.threads) == (f"torch.{target.dtype}", target.direction, target.threads)
        and target.size.items() <= dict(m.size).items()
    ]
    assert set(target.contenders) & set(suite.backends) <= set(measured)
    assert target.against is None or target.against in measured


def test_traffic_of_both_is_the_sum():
    suite = suite_of("sorted_l1")
    student, teacher = suite.inputs(torch.bfloat16, "cpu", 0, **dict(small(suite, "reference").size))
    bytes_of = {d: small(suite, "reference", direction=d).traffic(student, teacher) for d in DIRECTIONS}
    assert bytes_of["forward"] == 2 * 5 * (301 + 257) * 2
    assert bytes_of["both"] == bytes_of["forward"] + bytes_of["backward"]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_runs_do_what_the_direction_says(direction):
    suite = suite_of("row_entropy")
    measurement = small(suite, "reference", direction=direction)
    sets = [suite.inputs(torch.float32, "cpu", seed, **dict(measurement.size)) for seed in range(3)]
    for (logits,) in sets:
        logits.requires_grad_(direction != "forward")
    found = runs(lambda x: suite.ours(x, backend="reference"), measurement, sets)
    assert len(found) == 3
    for run, (logits,) in zip(found, sets, strict=True):
        (first,), (again,) = run(), run()
        torch.testing.assert_close(first, again)
        assert first.shape == (logits.shape[:2] if direction == "forward" else logits.shape)


def test_inputs_are_rotated_beyond_the_cache():
    suite = suite_of("row_entropy")
    few, many = (
        sets_of_inputs(small(suite, "reference", size=tuple({"sequences": 2, "rows": rows, "vocabulary": V}.items())))
        for rows, V in ((64, 100_000), (4, 100))
    )
    assert nbytes(*(x for each in few for x in each)) > 32 << 20
    assert 2 <= len(few) < len(many)
    assert not torch.equal(few[0][0], few[1][0])


def test_peak_memory_counts_what_is_held_at_a_time():
    suite = suite_of("row_entropy")
    # Above 32 MiB glibc maps every block by itself; below, what is resident depends on how its heap is cut up.
    size = tuple({"sequences": 2, "rows": 32, "vocabulary": 200_000}.items())
    logits = 2 * 32 * 200_000 * 4
    try:
        peak = memory.peak(small(suite, "torch.distributions", size=size))
    except OSError as error:
        pytest.skip(f"this system does not tell a process its peak: {error}")
    assert 3 * logits < peak < 8 * logits  # five tensors of their size at a time


def test_the_table_of_hard_rows(capsys):
    pytest.importorskip("rich", reason="the table is printed with rich; pip install 'mlot-kernels[demo]'")
    from bench import sorted_l1_rows

    sorted_l1_rows.main(["--vocabularies", "301", "257", "--rows", "2", "--turns", "1", "--backend", "reference"])
    printed = capsys.readouterr().out
    assert all(kind[:12] in printed for kind in sorted_l1_rows.KINDS)
    assert printed.count("(1.0)") >= len(sorted_l1_rows.DTYPES)
