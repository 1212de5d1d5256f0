"""What every test runs under."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = os.environ.get("MLOT_TEST_FULL") == "1"

hypothesis.settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.register_profile("full", max_examples=300, deadline=None)
hypothesis.settings.load_profile("full" if FULL else "quick")


@pytest.fixture(autouse=True)
def poison_and_seed() -> Iterator[None]:
    """Memory that nobody wrote holds NaN, so that reading it shows; and every test starts from the same seed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> str:
    return DEVICE
