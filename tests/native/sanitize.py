"""``make sanitize``: the C++ under the sanitizers, instrumented in a folder of its own.

Address and undefined behaviour: the native tests and the operators' contract, through Python. Threads: a program
without Python (``threads*.cpp``), because what torch's own threads run on is not instrumented.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or "c++"
# Compiling under torch.compile and checking schemas run no other C++, and take most of the contract's time.
CONTRACT = "native or (cpu and not compiles and not opcheck and not second_derivatives)"
# These start processes of their own, which last minutes when instrumented.
TOO_LONG = ("test_build.py", "test_capabilities.py", "test_threads.py")
ROUTINES = [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if path.name not in TOO_LONG]
TESTS = ("tests/test_contract.py", *(str(path.relative_to(ROOT)) for path in ROUTINES))


def build(sanitizers: str, folder: Path, probe: str) -> None:
    environment = {**os.environ, "MLOT_NATIVE": "1", "MLOT_PROBE": probe, "MLOT_SANITIZE": sanitizers}
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def check_address_and_undefined() -> None:
    folder = ROOT / "build/address-undefined"
    shutil.rmtree(folder, ignore_errors=True)
    build("address,undefined", folder, probe="1")
    # The tests lie beside the instrumented package: a test's own root is where Python looks first.
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    # The address sanitizer must come before the C++ library, whose exceptions it follows.
    names = ("libasan.so", "libstdc++.so")
    libraries = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaves memory behind at its end
        "OMP_NUM_THREADS": "2",
    }
    pytest = Path(sys.executable).with_name("pytest")
    subprocess.run([pytest, "-q", "-x", "-n", "auto", *TESTS, "-k", CONTRACT], cwd=folder, env=environment, check=True)


def check_threads() -> None:
    folder = ROOT / "build/thread"
    build("thread", folder, probe="0")
    (objects,) = (ROOT / "build").glob("native-*-thread/cpu")
    program = folder / "threads"
    command = [
        COMPILER,
        "-std=c++20",
        "-g",
        "-fsanitize=thread",
        "-DMLOT_ONE_INSTRUCTION_SET",
        f"-I{ROOT}/csrc/include",
    ]
    command += [*map(str, sorted((ROOT / "tests/native").glob("threads*.cpp")))]
    command += [*map(str, sorted(objects.glob("*.o"))), "-o", str(program)]
    subprocess.run(command, check=True)
    subprocess.run([program], check=True)


if __name__ == "__main__":
    check_threads()
    check_address_and_undefined()
