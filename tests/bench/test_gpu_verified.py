"""What ``gpu_check`` derives from what its parts saw, on made-up results."""

import dataclasses
import json
from xml.sax.saxutils import escape

import pytest

from bench import gpu_parts, gpu_verified
from mlot_kernels import verified
from mlot_kernels.registry import OPERATORS
from tests.test_contract import CASES

FACTS = {"architecture": "sm_1", "versions": {"torch": "2", "triton": "3"}, "commit": {"id": "c"}, "date": "d"}
MARK = {"torch": "2", "triton": "3", "commit": "c", "date": "d"}


def junit(path, *tests):
    cases = "".join(f'<testcase classname="tests.test_contract" name="{n}">{inner}</testcase>' for n, inner in tests)
    path.write_text(f'<?xml version="1.0"?><testsuites><testsuite>{cases}</testsuite></testsuites>')


def entry(contender, median, direction="both", size=1, subject="row_entropy", failure=None):
    seconds = None if median is None else {"median": median}
    identity = {"subject": subject, "contender": contender, "direction": direction, "size": {"rows": size}}
    return {**identity, "dtype": "float32", "device": "cuda", "seconds": seconds, "failure": failure}


GOOD = {("row_entropy", "triton"): [True], ("row_entropy", "cuda"): [True]}
MEASURED = [entry("reference", 3.0), entry("triton", 2.0), entry("cuda", 1.0), entry("cuda", 9.0, "forward")]


def derived(contract=GOOD, selftest=GOOD, others=(), benchmarks=MEASURED, pairs=GOOD):
    return gpu_verified.derive(pairs, (contract, selftest), others, benchmarks, MARK)


def judgement(seen):
    return {backend: (e["passed"], e["faster_than_next"], e["next"]) for backend, e in seen["row_entropy"].items()}


def test_contract_tests_tell_operator_and_backend(tmp_path):
    failed, broken, skipped = ('<failure message="">no</failure>', "<error/>", "<skipped/>")
    junit(
        tmp_path / "contract.xml",
        ("test_fidelity[float32-row_entropy-triton-odd width]", ""),
        ("test_memory[row_entropy-triton]", failed),
        ("test_memory[row_entropy-cuda]", skipped),
        ("test_opcheck[sinkhorn-cuda]", broken),
        ("test_compiles[inductor-topk_softmax-triton]", ""),
        ("test_memory[topk_softmax-reference]", failed),
        ("test_every_operator_has_all_its_rooms", failed),
    )
    assert gpu_verified.contract_verdicts(tmp_path / "contract.xml") == {
        ("row_entropy", "triton"): [True, False],
        ("sinkhorn", "cuda"): [False],
        ("topk_softmax", "triton"): [True],
    }


def test_names_of_the_real_contract_tests_are_understood(tmp_path, monkeypatch):
    """With the reference in a kernel's place, every operator of the registry is found in the real names."""
    monkeypatch.setattr(verified, "NEEDED", ("reference",))
    names = [f"test_fidelity[float32-{case.id}]" for case in CASES]
    junit(tmp_path / "contract.xml", *((escape(name), "") for name in names))
    found = gpu_verified.contract_verdicts(tmp_path / "contract.xml")
    assert {operator for operator, _ in found} == set(OPERATORS)
    assert sum(map(len, found.values())) == sum("-reference-" in name for name in names)


def test_a_good_and_fast_kernel_is_verified():
    seen = derived()
    assert judgement(seen) == {"triton": (True, True, "reference"), "cuda": (True, True, "triton")}
    assert MARK.items() <= seen["row_entropy"]["triton"].items()


@pytest.mark.parametrize(
    "changed",
    [
        {"contract": GOOD | {("row_entropy", "triton"): [True, False]}},
        {"contract": {("row_entropy", "cuda"): [True]}},  # it was not tested
        {"selftest": GOOD | {("row_entropy", "triton"): [False]}},
        {"selftest": {("row_entropy", "cuda"): [True]}},
        {"others": ({("row_entropy", "triton"): [False]},)},
        {"benchmarks": [*MEASURED, entry("triton", None, size=2, failure="the reference check failed")]},
    ],
)
def test_a_kernel_that_failed_is_not_and_the_other_is_held_against_the_one_that_runs(changed):
    assert judgement(derived(**changed)) == {"triton": (False, True, "reference"), "cuda": (True, True, "reference")}


def test_a_slow_kernel_is_not():
    slow = [entry("reference", 3.0), entry("triton", 4.0), entry("cuda", 3.5)]
    expected = {"triton": (True, False, "reference"), "cuda": (True, False, "reference")}
    assert judgement(derived(benchmarks=slow)) == expected
    # summed over the sizes
    mixed = [entry(c, t, size=n) for n, c, t in ((1, "reference", 1.0), (1, "triton", 2.0), (2, "reference", 9.0))]
    assert judgement(derived(benchmarks=[*mixed, entry("triton", 8.0, size=2)]))["triton"] == (True, True, "reference")
    assert judgement(derived(benchmarks=[*mixed, entry("triton", 8.1, size=2)]))["triton"] == (True, False, "reference")


@pytest.mark.parametrize(
    "benchmarks",
    [
        [],
        [entry("reference", 3.0)],
        [entry("triton", 2.0)],
        [entry("reference", 3.0), entry("reference", 3.0, size=2), entry("triton", 2.0)],
        [entry("reference", 3.0), entry("triton", 2.0, "forward")],
        [entry("reference", 3.0, subject="sinkhorn"), entry("triton", 2.0, subject="sinkhorn")],
        [{**e, "device": "cpu"} for e in MEASURED],
    ],
)
def test_what_was_not_measured_is_not_called_fast(benchmarks):
    assert judgement(derived(benchmarks=benchmarks))["triton"] == (True, None, "reference")


def test_an_operator_without_a_gradient_is_judged_by_its_forward():
    benchmarks = [entry("reference", 3.0, "forward"), entry("triton", 2.0, "forward")]
    assert judgement(derived(benchmarks=benchmarks))["triton"] == (True, True, "reference")


@pytest.fixture
def package_table(tmp_path, monkeypatch):
    path = tmp_path / "package" / "verified.json"
    path.parent.mkdir()
    old = {"sm_1": {"gone": {}}, "sm_2": {"row_entropy": {"triton": {"passed": True}}}}
    path.write_text(json.dumps({"format": 1, "architectures": old}))
    monkeypatch.setattr(verified, "PATH", path)
    return path


def finish(out, contract="failed"):
    """The files of a check whose contract tests ended so."""
    ended = [{"name": "contract", "status": contract}, {"name": "selftest", "status": "ok"}]
    (out / "gpu_check.json").write_text(json.dumps({**FACTS, "parts": ended}))
    junit(out / "contract.xml", ("test_opcheck[row_entropy-triton]", ""))
    (out / "selftest.json").write_text(
        json.dumps([dataclasses.asdict(gpu_parts.Line("row_entropy", "triton", "", None))])
    )
    (out / "benchmarks.json").write_text(json.dumps({"results": MEASURED}))


def test_the_package_keeps_what_other_gpus_saw(tmp_path, monkeypatch, package_table):
    monkeypatch.setitem(OPERATORS["row_entropy"].forward, "triton", len)
    finish(tmp_path)
    assert gpu_verified.main(["--out", str(tmp_path)]) == 0
    seen = json.loads(package_table.read_text())
    assert seen == json.loads((tmp_path / "verified.json").read_text())
    assert seen["format"] == 1
    judged = judgement(seen["architectures"]["sm_1"])
    assert judged["triton"] == (True, True, "reference")
    assert not judged["cuda"][0], "no test of it ran"
    assert "gone" not in seen["architectures"]["sm_1"]
    assert seen["architectures"]["sm_2"] == {"row_entropy": {"triton": {"passed": True}}}


def test_without_kernels_the_table_is_empty(tmp_path, monkeypatch, package_table):
    monkeypatch.setattr(gpu_verified, "kernels", lambda: iter(()))
    finish(tmp_path)
    assert gpu_verified.main(["--out", str(tmp_path)]) == 0
    assert json.loads(package_table.read_text())["architectures"]["sm_1"] == {}


@pytest.mark.parametrize("status", ["timed out", "skipped", "failed"])
def test_a_contract_that_was_cut_short_verifies_nothing(tmp_path, capsys, package_table, status):
    before = package_table.read_text()
    finish(tmp_path, status)
    if status == "failed":  # it crashed
        (tmp_path / "contract.xml").unlink()
    assert gpu_verified.main(["--out", str(tmp_path)]) == gpu_parts.SKIPPED
    assert "nothing is verified without all of contract, selftest" in capsys.readouterr().out
    assert package_table.read_text() == before
