"""The demo, at its small size: it runs to its end, and the numbers that it writes are there and hang together."""

import json
import math
import subprocess
import sys

import pytest

for package in ("matplotlib", "rich", "tokenizers"):
    pytest.importorskip(package, reason="the demo needs its extra: pip install 'mlot-kernels[demo]'")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "examples.distill", "--quick", "--output", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder, json.loads((folder / "results.json").read_text())


def test_the_loss_is_checked_on_real_logits(demo):
    printed, _, results = demo
    check = results["check"]
    assert check["passed"]
    assert check["differences"].keys() == check["tolerances"].keys() == {"value", "gradient", "by_hand"}
    for name, difference in check["differences"].items():
        assert 0 <= difference <= check["tolerances"][name]
    assert check["rows"] > 0
    assert len(check["measured"]) == 4
    assert all(row["milliseconds"] > 0 and row["peak_mebibytes"] > 0 for row in check["measured"])
    assert f"Backend: {check['backend']}" in printed


def test_every_loss_falls_on_held_out_text(demo):
    from examples.distill import LOSSES

    _, _, results = demo
    alone, *runs = results["runs"]
    assert alone["weight"] is None
    assert {run["name"] for run in runs} == {entry.name for entry in LOSSES}
    for run in runs:
        held_out = run["distillation"][run["name"]]
        assert len(held_out) == len(run["steps"])
        assert all(map(math.isfinite, held_out))
        assert held_out[-1] < held_out[0]
        assert held_out[-1] < alone["distillation"][run["name"]][-1]
        assert run["fell"]
        # all start from the same student, and the run without the loss is measured by it, too
        assert held_out[0] == pytest.approx(alone["distillation"][run["name"]][0], rel=1e-4)
        assert run["cross_entropy_per_token"][0] == pytest.approx(alone["cross_entropy_per_token"][0], rel=1e-4)
    assert results["passed"]


def test_the_figure_and_the_table_are_written(demo):
    printed, folder, results = demo
    assert (folder / "distill.png").read_bytes().startswith(b"\x89PNG")
    assert 0 < results["corpus"]["aligned_share"] < 1
    assert results["teacher"]["vocabulary"] != results["student"]["vocabulary"]
    for run in results["runs"]:
        assert run["name"] in printed


@pytest.mark.parametrize("factor", [-1, 0])
def test_a_loss_that_does_nothing_good_fails_the_demo(tmp_path, monkeypatch, factor):
    """With its gradient dropped or turned round, a loss must not pass: cross-entropy alone lowers it, too."""
    from examples import distill
    from examples.training import Entry

    class Broken(type(distill.LOSSES[0].loss)):
        def forward(self, *arguments, **options):
            value = super().forward(*arguments, **options)
            return value.detach() + factor * (value - value.detach())

    monkeypatch.setattr(distill, "LOSSES", [Entry("broken", Broken(), weight=distill.LOSSES[0].weight)])
    assert distill.main(["--quick", "--output", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "results.json").read_text())["passed"] is False
