"""Hypothesis for the property tests; where it is not installed, they are skipped and say so, and the others run.

Machines with a GPU often have torch, triton and pytest and nothing else.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import FULL

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:

    def given(*_: Any, **__: Any) -> Any:
        return pytest.mark.skip(reason="a property test needs hypothesis: pip install hypothesis")

    class Undrawn:
        """Any strategy: modules make some at their top, and no test draws from them."""

        def __getattr__(self, _: str) -> Undrawn:
            return self

        def __call__(self, *_: Any, **__: Any) -> Undrawn:
            return self

    st = Undrawn()
else:
    settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
    settings.register_profile("full", max_examples=300, deadline=None)
    settings.load_profile("full" if FULL else "quick")

__all__ = ["given", "st"]
