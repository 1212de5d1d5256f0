"""``info`` names everything, and never fails."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from unittest import mock

import pytest
import torch

from mlot_kernels import backends, info
from mlot_kernels.__main__ import main
from mlot_kernels.registry import OPERATORS

AARCH64 = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes asimdhp sve i8mm bf16
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd40

processor\t: 1
"""


def git(folder, *arguments):
    identity = ("-c", "user.name=Tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *identity, "-C", folder, *arguments], check=True, capture_output=True, text=True, env=environment
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a package, which poses as this one."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    package = tmp_path / "mlot_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    git(tmp_path, "init", "--quiet")
    monkeypatch.setattr(info, "PACKAGE", package)
    return tmp_path


def installed_from(monkeypatch, **direct_url):
    files = {"direct_url.json": json.dumps({"url": "https://example.org", **direct_url})}
    distribution = mock.Mock(read_text=files.get)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)


def test_the_report_names_every_operator_and_backend_and_reason(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    table = said[said.index("operators on cpu") :].splitlines()
    assert table[1].split() == list(backends.BACKENDS)
    assert [line.split()[0] for line in table[2 : 2 + len(OPERATORS)]] == sorted(OPERATORS)
    reasons = {
        reason or operator["passed_over"].get(backend)
        for device in info.collect()["operators"].values()
        for operator in device.values()
        for backend, reason in operator["refusals"].items()
    } - {None}
    assert reasons
    assert all(f") {reason}" in said for reason in reasons)


def test_a_backend_that_runs_if_it_is_named(monkeypatch):
    operator = {"chosen": "reference", "refusals": dict.fromkeys(backends.BACKENDS), "passed_over": {"cuda": "slow"}}
    operator["refusals"]["cpu"] = "too wide"
    said = info._table("cuda", {"sinkhorn": operator}, None)
    assert said[2].split() == ["sinkhorn", "auto", "(1)", "runs", "runs", "(2)"]
    assert said[3:] == ["  (1) too wide", "  (2) slow"]
    assert info._table("cuda", {"sinkhorn": operator}, "reference")[2].split()[1] == "set"


def test_collect_is_plain_data():
    found = info.collect()
    assert json.loads(json.dumps(found)) == found
    assert found["machine"].keys() == {
        *("name", "cpu", "cpu_vendor", "cpu_family", "cpu_model", "cores", "instruction_sets", "last_level_cache"),
        *("memory", "gpu", "system", "python"),
    }
    assert found["commit"].keys() == {"id", "dirty"}
    assert found["software"]["torch"] == torch.__version__


def test_a_report_that_finds_nothing_out_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(info, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(info, "CACHES", tmp_path / "cache")
    monkeypatch.setattr(info, "PACKAGE", tmp_path)
    monkeypatch.setattr(info, "cases_of", mock.Mock(side_effect=OSError("disk on fire")))
    monkeypatch.setattr(importlib.metadata, "version", mock.Mock(side_effect=KeyError("Name")))
    monkeypatch.setattr(importlib.metadata, "distribution", mock.Mock(side_effect=KeyError("Name")))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", mock.Mock(side_effect=RuntimeError("no answer")))
    monkeypatch.setattr(os, "sysconf", mock.Mock(side_effect=ValueError("unrecognized configuration name")))
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "_build.json").write_text("{")
    said = {line.strip().partition("  ")[0]: line for line in info.report().splitlines()}
    assert "mlot_kernels unknown (KeyError: 'Name')" in said
    assert "unknown (git is not on PATH; KeyError: 'Name')" in said["commit"]
    for name in ("build", "instruction sets", "torch computes in", "last-level cache", "memory", "triton"):
        assert "unknown (" in said[name], name
    assert "none (nvcc is not on PATH)" in said["nvcc"]
    assert "none (nvidia-smi is not on PATH)" in said["driver"]
    assert said["(1) unknown (OSError: disk on fire)"]


def test_a_program_that_fails_is_quoted(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho no driver >&2\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert info.collect()["missing"]["driver"] == "unknown (nvidia-smi failed: no driver)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_left_alone():
    found = info.collect()
    assert not torch.cuda.is_initialized()
    assert found["machine"]["gpu"] is None
    assert found["operators"].keys() == {"cpu"}
    assert found["missing"]["gpu"].startswith("none (torch ")


def test_a_machine_with_a_gpu_has_its_name(monkeypatch):
    gpu = {"name": "NVIDIA H200", "capability": "9.0", "memory": 150 << 30}
    monkeypatch.setattr(info, "_gpus", lambda: [gpu])
    monkeypatch.setattr(info, "_driver", lambda: "580.1")
    monkeypatch.setattr(info, "_operators", lambda device: {})
    found = info.collect()
    assert found["machine"]["name"] == "nvidia-h200"
    assert found["machine"]["gpu"] == {**gpu, "driver": "580.1"}
    assert "NVIDIA H200, compute capability 9.0, 150.0 GiB" in info.report()
    assert "operators on cuda" in info.report()


def test_an_aarch64_processor(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(AARCH64)
    monkeypatch.setattr(info, "CPUINFO", tmp_path / "cpuinfo")
    machine = info.collect()["machine"]
    assert (machine["cpu_vendor"], machine["cpu_family"], machine["cpu_model"]) == ("0x41", 8, 0xD40)
    assert machine["instruction_sets"] == ["asimd", "asimdhp", "bf16", "i8mm", "sve"]


def test_a_processors_name_is_fit_for_a_file():
    assert info._slug("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz") == "intel-xeon-platinum-8481c-cpu"


def test_the_last_level_cache_is_the_one_of_the_highest_level(monkeypatch, tmp_path):
    for index, (level, size) in enumerate([(1, "32K"), (3, "36M"), (2, "2048K")]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "level").write_text(f"{level}\n")
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(info, "CACHES", tmp_path)
    assert info._last_level_cache() == 36 << 20


def test_the_commit_of_a_checkout(checkout):
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "first")
    assert info.collect()["commit"] == {"id": git(checkout, "rev-parse", "HEAD"), "dirty": False}
    (checkout / "mlot_kernels" / "new.py").touch()
    assert info.collect()["commit"]["dirty"] is True
    assert "with changes beside it" in info.report()


def test_another_projects_checkout_is_not_ours(checkout, monkeypatch):
    git(checkout, "commit", "--quiet", "--allow-empty", "-m", "theirs")
    installed_from(monkeypatch, dir_info={})
    found = info.collect()
    assert found["commit"] == {"id": None, "dirty": None}
    assert "not installed from a repository" in found["missing"]["commit"]
    installed_from(monkeypatch, vcs_info={"vcs": "git", "commit_id": "abc"})
    assert info.collect()["commit"] == {"id": "abc", "dirty": False}


def test_a_build_is_named(checkout, monkeypatch):
    installed_from(monkeypatch)
    assert "pure Python, no native library" in info.report()
    build = {"commit": "abc", "cuda": "13.0", "architectures": ["sm_80", "sm_90"]}
    (checkout / "mlot_kernels" / "_build.json").write_text(json.dumps(build))
    found = info.collect()
    assert found["package"]["build"] == build
    assert found["commit"] == {"id": "abc", "dirty": None}
    assert "cuda 13.0, architectures ['sm_80', 'sm_90']" in info.report()


def test_variables_that_are_set_are_shown(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MLOT_BACKEND", raising=False)
    found = info.collect()["environment"]
    assert found["OMP_NUM_THREADS"] == "3"
    assert "MLOT_BACKEND" not in found
    assert "OMP_NUM_THREADS=3" in info.report()
