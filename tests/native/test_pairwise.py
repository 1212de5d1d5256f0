"""What pairwise.h promises and no operator asks for alone, on the instruction set of this process."""

from __future__ import annotations

import numpy as np
import pytest

from mlot_kernels.transport import METRICS

probe = pytest.importorskip("mlot_kernels._probe", reason="built with MLOT_PROBE=1 alone")

ROWS = 13  # three tiles of 4 and one more


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 64, 65, 131])
def test_rows_asked_for_together_change_no_bit(metric, dtype, width):
    """Operators ask for whole slabs, whose size is theirs to choose: with costs or gradients that depended on where a
    slab starts, another choice, or a row more in a batch, would change the others' bits."""
    generator = np.random.default_rng(width)
    x, y = (generator.uniform(0.1, 1, (rows, width)).astype(dtype) for rows in (ROWS, 35))
    weights = generator.standard_normal((ROWS, 35)).astype(dtype)
    costs, gradient = (getattr(probe, f"{name}_{dtype}") for name in ("cost_rows", "cost_gradient_rows"))
    all_costs = costs(metric, x, y, 0, ROWS)
    all_gradients = gradient(metric, x, y, 0, ROWS, weights)
    assert np.isfinite(all_costs).all()
    for first, last in ((0, 1), (1, 2), (3, 9), (5, 13), (12, 13), (4, 12)):
        np.testing.assert_array_equal(costs(metric, x, y, first, last), all_costs[first:last])
        own = gradient(metric, x, y, first, last, weights[first:last])
        np.testing.assert_array_equal(own, all_gradients[first:last])
