"""Without the native library there is nothing to test here; with one that does not load there is."""

from __future__ import annotations

import pytest

from mlot_kernels import native


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = native.MISSING["cpu"]
    if reason is None or "did not load" in reason:
        return
    for item in items:
        if item.path.parent.name == "native" and item.path.name != "test_build.py":
            item.add_marker(pytest.mark.skip(reason=reason))
