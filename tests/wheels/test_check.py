"""That the checks of a wheel find what they are for, and that a wheel built here passes them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile

import pytest

from mlot_kernels import native
from wheels import build, check

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++, which makes the libraries")


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    """The wheel without native libraries, which takes seconds."""
    return build.build("python", tmp_path_factory.mktemp("dist"))


def changed(wheel, folder, name, without, more):
    """A copy of a wheel under another name, with files left out and put in."""
    made = folder / (name or wheel.name)
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(made, "w") as target:
        for entry in source.namelist():
            if entry not in without:
                target.writestr(entry, source.read(entry))
        for entry, content in more.items():
            target.writestr(entry, content)
    return made


def test_a_pure_wheel_is_right(pure):
    assert list(check.problems(pure)) == []
    assert build.facts(pure)["missing"] == "it was installed with MLOT_NATIVE=0"


def test_built_twice_it_is_the_same(pure, tmp_path):
    assert build.build("python", tmp_path).read_bytes() == pure.read_bytes()


@pytest.mark.parametrize(
    ("name", "without", "more", "problem"),
    [
        ("mlot_kernels-0.1-cp311-cp311-linux_x86_64.whl", (), {}, "tagged cp311-cp311-linux_x86_64, not py3-none-any"),
        ("mlot_kernels-0.1+cpu-py3-none-any.whl", (), {}, "tagged py3-none-any, not py3-none-linux_x86_64"),
        ("mlot-0.1-py3-none-any.whl", (), {}, "its name is not"),
        (None, ("mlot_kernels/verified.json",), {}, "it lacks mlot_kernels/verified.json"),
        (None, ("mlot_kernels/ops/sinkhorn/README.md",), {}, "it lacks mlot_kernels/ops/sinkhorn/README.md"),
        (None, (), {"tests/test_rows.py": b""}, "it holds more than mlot_kernels"),
        (None, (), {"mlot_kernels/_probe.cpython-311.so": b""}, "its libraries are _probe.cpython-311.so"),
        (None, (), {"mlot_kernels/data": bytes(2**20)}, "MiB, more than 1"),
    ],
)
def test_a_wrong_wheel_is_found_out(pure, tmp_path, name, without, more, problem):
    assert problem in "\n".join(check.problems(changed(pure, tmp_path, name, without, more)))


def library(folder, code, *options):
    made = folder / "_cpu.so"
    command = ["g++", "-shared", "-fPIC", "-nostdlib", "-x", "c", "-", *options, "-o", str(made)]
    subprocess.run(command, input=code, text=True, check=True)
    return made


@needs_compiler
@pytest.mark.parametrize(
    ("code", "options", "problem"),
    [
        ("int nothing;", (), None),
        ("void PyErr_Clear(); void f() { PyErr_Clear(); }", (), "do not have PyErr_Clear"),
        ("void aoti_torch_cpu_topk(); void f() { aoti_torch_cpu_topk(); }", (), "do not have aoti_torch_cpu_topk"),
        ("void torch_list_size(); void f() { torch_list_size(); }", (), None),
        (f'const char* f() {{ return "{check.ROOT}/csrc/cpu/rows.cpp"; }}', (), "paths of the machine that built it"),
        ('const char* f() { return "_GLOBAL__N__fa2ac9b9_7_rows_cu"; }', (), "that nvcc made of a path and a process"),
        ("int nothing;", ("-Wl,-rpath,/opt/torch/lib",), "a search path of its own"),
        ("void* f() { return 0; }", ("-Wl,--no-as-needed", "-l:libdl.so.2"), "it needs libdl.so.2"),
    ],
)
def test_a_wrong_library_is_found_out(tmp_path, code, options, problem):
    found = list(check.problems_of_library(library(tmp_path, code, *options), "cpu"))
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_kernels_newer_than_the_driver_are_refused_by_name():
    assert native.too_new_for_the_driver("13.0", 13000) is None
    assert native.too_new_for_the_driver("12.8", 13010) is None
    assert native.too_new_for_the_driver("13.2", 13000) is None  # within a major version drivers run newer code
    assert native.too_new_for_the_driver("13.0", 0) is None
    assert native.too_new_for_the_driver(None, 12080) is None
    said = native.too_new_for_the_driver("13.0", 12080)
    assert (
        "built with CUDA 13.0, and this machine's driver knows up to CUDA 12.8; update the driver, or install" in said
    )


@needs_compiler
def test_the_driver_tells_its_version(tmp_path):
    there = library(tmp_path, "int cuDriverGetVersion(int* version) { *version = 12080; return 0; }")
    assert native.driver(str(there)) == 12080
    assert native.driver("/nonexistent/libcuda.so.1") == 0


def test_a_torch_that_is_too_old_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(native.torch, "__version__", "2.9.1+cu128")
    assert native.load("cpu") == "torch 2.9.1+cu128 is older than 2.10; install a newer one"


@pytest.mark.skipif(
    os.environ.get("MLOT_TEST_WHEEL") != "1", reason="MLOT_TEST_WHEEL=1 builds a wheel with all native libraries"
)
def test_a_native_wheel_is_right_and_works(tmp_path, monkeypatch):
    """Of the objects that this installation was built from, with the toolkit that it was built with."""
    built = json.loads((native.FOLDER / "_build.json").read_text())
    if built["cuda"]:
        monkeypatch.setenv("CUDA_HOME", str(build.mlot_toolchain.find_toolkit().home))
    wheel = build.build(built["cuda"] or "none", tmp_path / "dist")
    assert list(check.problems(wheel)) == []
    python = check.environment(tmp_path / "clean", check.BORROWED)
    said = check.works(wheel, python, "--op", "row_entropy", "sorted_l1", "sinkhorn")
    assert f"cuda {built['cuda']}" in said
    assert f"commit {build.facts(wheel)['commit']}" in said
