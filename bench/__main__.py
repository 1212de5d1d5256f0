"""``python -m bench``: measure, write ``bench/results/<machine>.json``, and make its page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from bench import report
from mlot_kernels.info import collect


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--suite", choices=("quick", "full"), default="quick", help="how much to measure")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), metavar="FOLDER")
    arguments, pytest_arguments = parser.parse_known_args()
    path = arguments.results / f"{collect()['machine']['name']}.json"
    options = ["-q", "--benchmark-quiet", "--suite", arguments.suite, "--device", arguments.device, "--results", path]
    status = pytest.main([str(Path(__file__).parent), *map(str, options), *pytest_arguments])
    if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        report.main([str(path)])
    return int(status)


sys.exit(main())
