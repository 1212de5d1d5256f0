"""What the build does where something that it needs is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mlot_kernels import native, triton_tiles, verified

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="these are no sources that can be built")


@pytest.fixture
def tree(tmp_path):
    """The sources alone, as a fresh clone has them."""
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("mlot_kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    return tree


def setup(tree, *arguments, **environment):
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLOT_", "CXX", "TORCH_CUDA"))
    }
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=tree, env={**inherited, **environment}, capture_output=True, text=True)


WITHOUT = {
    "compiler": ({"CXX": "/nonexistent"}, "there is no C++ compiler, /nonexistent"),
    "any tool": ({"PATH": "/nonexistent"}, "there is no C++ compiler, g++ or c++"),
    "torch": ({"MLOT_TORCH_DIR": "/nonexistent"}, "there is no torch in this environment; install it first"),
    "being asked to": ({"MLOT_NATIVE": "0"}, "it was installed with MLOT_NATIVE=0"),
}
without = pytest.mark.parametrize(("environment", "words"), WITHOUT.values(), ids=WITHOUT)


@without
def test_the_python_parts_install_alone_and_say_why(tree, environment, words):
    done = setup(tree, "bdist_wheel", "--dist-dir", "dist", **environment)
    assert done.returncode == 0, done.stderr
    assert f"[mlot] the Python parts alone, which compute everything in plain torch: {words}" in done.stderr
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    installed = tree / "installed"
    with zipfile.ZipFile(wheel) as archive:
        assert not any(name.endswith(".so") for name in archive.namelist())
        archive.extractall(installed)
    facts = json.loads((installed / "mlot_kernels/_build.json").read_text())
    assert facts["architectures"] == []
    assert words in facts["missing"]
    assert words in native.load("cpu", installed / "mlot_kernels")


@pytest.mark.parametrize("environment", [environment for environment, _ in WITHOUT.values()][:3], ids=list(WITHOUT)[:3])
def test_asked_to_build_it_fails(tree, environment):
    done = setup(tree, "--version", MLOT_NATIVE="1", **environment)
    assert done.returncode != 0
    assert "MLOT_NATIVE=1, and the native parts cannot be built: there is no" in done.stderr


def test_a_wrong_switch_is_an_error(tree):
    done = setup(tree, "--version", MLOT_NATIVE="yes")
    assert "MLOT_NATIVE must be 0, 1 or unset, got 'yes'" in done.stderr


@pytest.fixture
def toolkit(tmp_path):
    """A folder for CUDA_HOME whose nvcc says that it is of a version and knows some architectures."""

    def make(version, *known):
        nvcc = tmp_path / version / "bin/nvcc"
        nvcc.parent.mkdir(parents=True)
        listed = "\n".join(f"compute_{name}" for name in known)
        nvcc.write_text(
            f"#!/bin/sh\nif [ $1 = --list-gpu-arch ]; then echo '{listed}'\n"
            f"else echo Cuda compilation tools, release {version}, V{version}.131; fi\n"
        )
        nvcc.chmod(0o755)
        return str(nvcc.parents[1])

    return make


def test_without_nvcc_there_are_no_cuda_kernels(tree):
    done = setup(tree, "--version", CUDA_HOME="/nonexistent")
    assert done.returncode == 0
    assert "[mlot] CUDA kernels: none, there is no nvcc: CUDA_HOME=/nonexistent has none; install" in done.stderr
    done = setup(tree, "--version", CUDA_HOME="/nonexistent", MLOT_CUDA="1")
    assert done.returncode != 0
    assert "[mlot] MLOT_CUDA=1, and the CUDA kernels cannot be built: there is no nvcc" in done.stderr


def test_an_nvcc_that_is_too_old_is_refused_by_name(tree, toolkit):
    home = toolkit("12.3")
    done = setup(tree, "--version", CUDA_HOME=home, MLOT_CUDA="1")
    assert done.returncode != 0
    assert f"{home}/bin/nvcc is CUDA 12.3; the kernels need 12.4 or newer" in done.stderr


def test_kernels_are_compiled_for_what_nvcc_knows(tree, toolkit):
    done = setup(tree, "--version", CUDA_HOME=toolkit("12.4", "50", "80", "90"))
    assert "CUDA kernels: CUDA 12.4 for sm_80, sm_90, compute_90" in done.stderr
    assert done.stdout.strip() == "0.1.0.dev0+cu124"
    done = setup(tree, "--version", CUDA_HOME=toolkit("13.0", "75", "80", "86", "90", "100", "110", "120"))
    assert "CUDA kernels: CUDA 13.0 for sm_80, sm_90, sm_100, sm_120, compute_90" in done.stderr


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("9.0", "CUDA 12.4 for sm_90\n"),
        ("8.0 9.0a+PTX", "CUDA 12.4 for sm_80, sm_90a, compute_90a\n"),
        ("7.5;8.6;9.0+PTX", "TORCH_CUDA_ARCH_LIST: 7.5 is left out; the kernels need sm_80 or newer"),
        ("7.5;8.6;9.0+PTX", "CUDA 12.4 for sm_86, sm_90, compute_90\n"),
    ],
)
def test_the_list_of_architectures_is_followed(tree, toolkit, wanted, words):
    home = toolkit("12.4", "75", "80", "86", "90")
    done = setup(tree, "--version", CUDA_HOME=home, MLOT_CUDA="1", TORCH_CUDA_ARCH_LIST=wanted)
    assert words in done.stderr


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("9.0;12.0", "asks for 12.0, which {home}/bin/nvcc (CUDA 12.4) does not know, only sm_75, sm_80, sm_90; leave"),
        ("Hopper", "'Hopper' is no architecture; write them as '8.0;9.0;12.0+PTX'"),
        ("7.0;7.5", "names nothing from sm_80 on; add one, or unset it"),
    ],
)
def test_what_cannot_be_compiled_for_is_refused_by_name(tree, toolkit, wanted, words):
    home = toolkit("12.4", "75", "80", "90")
    done = setup(tree, "--version", CUDA_HOME=home, MLOT_CUDA="1", TORCH_CUDA_ARCH_LIST=wanted)
    assert done.returncode != 0
    assert words.format(home=home) in done.stderr


def test_cuda_kernels_are_left_out_on_request(tree):
    assert "CUDA kernels: none, it was built with MLOT_CUDA=0" in setup(tree, "--version", MLOT_CUDA="0").stderr


def test_why_a_library_is_missing_is_kept(tmp_path):
    (tmp_path / "_build.json").write_text(json.dumps({"missing_cuda": "there is no nvcc"}))
    said = native.load("cuda", tmp_path)
    assert (
        "there is no nvcc; with nvcc, g++, ninja and torch in place, install mlot-kernels again with MLOT_CUDA=1"
        in said
    )


def test_an_older_torch_is_refused_by_name(tree, tmp_path):
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    done = setup(tree, "--version", MLOT_TORCH_DIR=str(tmp_path), MLOT_NATIVE="1")
    assert "torch 2.9.1+cpu is older than 2.10" in done.stderr


def test_no_wheel_holds_the_probe(tree):
    if native.MISSING["cpu"]:
        pytest.skip(native.MISSING["cpu"])
    done = setup(tree, "bdist_wheel", "--dist-dir", "dist", MLOT_PROBE="1")
    assert done.returncode != 0
    assert "no wheel may hold what MLOT_PROBE builds" in done.stderr


def test_no_wheel_holds_the_probe_of_an_earlier_build(tree):
    left = tree / "build/lib/mlot_kernels/_probe.cpython-311-x86_64-linux-gnu.so"
    left.parent.mkdir(parents=True)
    left.touch()
    assert setup(tree, "bdist_wheel", "--dist-dir", "dist", MLOT_NATIVE="0").returncode == 0
    (wheel,) = (tree / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        assert not any("_probe" in name for name in archive.namelist())


def test_a_wheel_holds_what_the_package_reads(tree):
    assert setup(tree, "bdist_wheel", "--dist-dir", "dist", MLOT_NATIVE="0").returncode == 0
    (wheel,) = (tree / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        for path in (triton_tiles.PATH, verified.PATH):
            assert archive.read(f"mlot_kernels/{path.name}") == path.read_bytes()


def test_the_source_distribution_can_be_built(tree):
    done = setup(tree, "sdist", "--formats", "zip", "--dist-dir", "dist", MLOT_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").iterdir()
    with zipfile.ZipFile(archive) as files:
        names = {name.partition("/")[2] for name in files.namelist()}
    files = (ROOT / "csrc").rglob("*")
    sources = {str(path.relative_to(ROOT)) for path in files if path.suffix in (".cpp", ".cu", ".h", ".py")}
    assert sources < names
    assert "COMMIT" in names
    assert "setup.py" in names
    assert "mlot_kernels/_build.json" not in names


def test_a_library_that_does_not_load_is_not_silent(tmp_path):
    (tmp_path / "_cpu.so").write_bytes(b"no library")
    with pytest.warns(UserWarning, match="_cpu.so did not load"):
        assert "install mlot-kernels again beside this torch" in native.load("cpu", tmp_path)


def test_a_tree_that_was_never_built_says_so(tmp_path):
    assert "it was never built" in native.load("cpu", tmp_path)
