"""What ``make wheel`` refuses, and how it says so; what it fetches."""

from __future__ import annotations

import pytest

from wheels import build


@pytest.fixture
def installed(tmp_path):
    """A toolkit that says it is CUDA 12.8."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.8, V12.8.93\n")
    nvcc.chmod(0o755)
    return tmp_path / "cuda"


def refused(cuda, **environment):
    with pytest.raises(SystemExit) as caught:
        build.toolkit(cuda, environment)
    return str(caught.value)


def test_an_older_cuda_needs_an_installed_toolkit(installed):
    said = refused("12.8")
    assert "the package index has no nvcc before CUDA 13.0" in said
    assert "Set CUDA_HOME to an installed CUDA 12.8 toolkit" in said
    assert "docs/releasing.md" in said
    assert (build.ROOT / "docs/releasing.md").read_text().count("podman run")
    assert build.toolkit("12.8", {"CUDA_HOME": str(installed)}) == installed


def test_a_toolkit_of_another_version_is_refused(installed, tmp_path):
    assert f"CUDA=12.6, and CUDA_HOME={installed} is 12.8; name a CUDA 12.6" in refused(
        "12.6", CUDA_HOME=str(installed)
    )
    assert f"CUDA_HOME={tmp_path} has no bin/nvcc" in refused("12.8", CUDA_HOME=str(tmp_path))


@pytest.mark.parametrize("cuda", ["13", "cu130", "CPU", ""])
def test_what_is_no_version_is_refused(cuda):
    assert f"CUDA={cuda}: give a version such as 13.0, none (no CUDA) or python (nothing native)" in refused(cuda)


def test_every_part_of_a_fetched_toolkit_is_pinned():
    """Left to itself nvcc 13.0 brings the newest compiler stages, which are another version's."""
    pinned = dict(x.split("==") for x in build.packages("13.2") if "==" in x)
    assert set(pinned) == {"nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-nvvm"}
    assert set(pinned.values()) == {"13.2.*"}
    assert "nvidia-cuda-cccl>=13.0,<13.3" in build.packages("13.2")


def test_each_variant_has_a_folder_of_its_own():
    assert [build.folder_of(cuda) for cuda in ("python", "none", "13.0", "12.8")] == ["python", "cpu", "cu130", "cu128"]


def test_variants_insist_on_what_they_are(monkeypatch, installed):
    monkeypatch.setenv("CUDA_HOME", str(installed))
    assert build.variables("python") == {"MLOT_NATIVE": "0"}
    assert build.variables("none") == {"MLOT_NATIVE": "1", "MLOT_CUDA": "0"}
    assert build.variables("12.8") == {"MLOT_NATIVE": "1", "MLOT_CUDA": "1", "CUDA_HOME": str(installed)}
