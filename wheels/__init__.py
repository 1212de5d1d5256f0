"""Builds wheels for given CUDA versions, and checks them: ``make wheel``, ``make wheels``, ``make check-wheels``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc"))  # for mlot_toolchain, as setup.py does
