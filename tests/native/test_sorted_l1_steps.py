"""Steps of a sign as a function of the logit, against a plain search, on the instruction set of this process."""

from __future__ import annotations

import numpy as np
import pytest

probe = pytest.importorskip("mlot_kernels._probe", reason="built with MLOT_PROBE=1 alone")

dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def routine(name: str, dtype: type):
    return getattr(probe, f"{name}_{np.dtype(dtype).name}")


class Steps:
    """As sorted_l1_steps.h has them; several of one logit have lengths, and the first columns are the first one's."""

    def __init__(self, dtype: type) -> None:
        self.dtype = dtype
        self.below, self.sign, self.length = [], [], []

    def add(self, below: float, sign: float, length: int = 0) -> Steps:
        self.below.append(below), self.sign.append(sign), self.length.append(length)
        return self

    def arrays(self) -> tuple[np.ndarray, ...]:
        return (
            np.array(self.below, dtype=self.dtype),
            np.array(self.sign, dtype=self.dtype),
            np.array(self.length, dtype=np.uint32),
        )

    def search(self, x: np.ndarray) -> np.ndarray:
        """The sign of each column in order."""
        below, sign, length = self.arrays()
        used = np.zeros(len(below), dtype=np.int64)
        signs = []
        for value in x:
            step = max(i for i in range(len(below)) if i == 0 or value < below[i])
            same = [i for i in range(len(below)) if below[i] == below[step]] if length[step] else [step]
            free = [i for i in same if used[i] < length[i]]
            step = free[0] if free else step
            used[step] += 1
            signs.append(sign[step])
        return np.array(signs, dtype=self.dtype)


def distinct(dtype: type, n: int, kind: str) -> np.ndarray:
    """n logits in descending order."""
    generator = np.random.default_rng(n)
    if kind == "neighbours":  # many steps in one of the table's buckets
        bits = np.int32 if dtype is np.float32 else np.int64
        return (np.array(1.5, dtype).view(bits) - np.arange(n, dtype=bits)).view(dtype)
    x = generator.standard_normal(2 * n) * {"usual": 3, "every size": 1}[kind]
    if kind == "every size":
        x = np.concatenate([x * 10.0 ** generator.integers(-30, 30, 2 * n), [0.0, 1e-45, -1e-45]])
    return np.unique(x.astype(dtype))[::-1][:n]


def columns_of(values: np.ndarray) -> np.ndarray:
    """The logits, their neighbours, both zeros, -inf and far ones, in any order."""
    infinity = np.array(np.inf, values.dtype)
    others = np.array([0.0, -0.0, -np.inf, 1e30, -1e30], values.dtype)
    x = np.concatenate([values, np.nextafter(values, infinity), np.nextafter(values, -infinity), others])
    return np.random.default_rng(0).permutation(x)


@dtypes
@pytest.mark.parametrize("kind", ["usual", "every size", "neighbours"])
@pytest.mark.parametrize("n", [1, 2, 65, 700])
def test_the_table_finds_the_step_of_a_plain_search(dtype, n, kind):
    """A bucket that starts behind its largest logit's step gives the columns there the wrong sign."""
    thresholds = distinct(dtype, n, kind)
    steps = Steps(dtype).add(np.inf, 1)
    for i, below in enumerate(thresholds[1:]):
        steps.add(below, (-1, 0, 1, 0.25)[i % 4])
    x = columns_of(thresholds)
    np.testing.assert_array_equal(routine("step_signs", dtype)(*steps.arrays(), x), steps.search(x))


@dtypes
@pytest.mark.parametrize("where", ["first", "between", "last", "everywhere"])
def test_a_split_logit_gives_its_signs_in_the_order_of_columns(dtype, where):
    """As a stable sort would: the first columns have the first sign. A split logit's neighbours have their own."""
    logits = np.array([2, 1, 0, -3], dtype)
    split = {"first": [0], "between": [1, 2], "last": [3], "everywhere": [0, 1, 2, 3]}[where]
    steps = Steps(dtype)
    x = []
    for i, logit in enumerate(logits):
        below = np.inf if i == 0 else np.nextafter(logit, np.array(np.inf, dtype))
        x += [logit] * 6
        if i in split:
            for sign, length in ((1, 1), (0, 2), (-1, 3)):
                steps.add(below, sign, length)
        else:
            steps.add(below, (1, -1)[i % 2])
    row = np.random.default_rng(3).permutation(np.array(x, dtype))
    ours = routine("step_signs", dtype)(*steps.arrays(), row)
    np.testing.assert_array_equal(ours, steps.search(row))
    for i in split:
        assert ours[row == logits[i]].tolist() == [1, 0, 0, -1, -1, -1]
    assert routine("load_steps", dtype)(routine("save_steps", dtype)(*steps.arrays())) is None


@dtypes
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65])
def test_steps_survive_being_saved(dtype, n):
    """All of them or none: backward orders the pair again where they are too many, and must not take some for all."""
    below = np.append(np.array(np.inf, dtype), distinct(dtype, n, "usual")[1:])
    steps = Steps(dtype)
    for i in range(n):
        steps.add(below[i], (1, -1, 0.125)[i % 3])
    saved = routine("save_steps", dtype)(*steps.arrays())
    loaded = routine("load_steps", dtype)(saved)
    if n > probe.saved_steps:
        assert loaded is None
        return
    np.testing.assert_array_equal(loaded[0], steps.arrays()[0])
    np.testing.assert_array_equal(loaded[1], steps.arrays()[1])
    assert not saved.reshape(-1, 2)[n:].any()  # an output of forward: written in full


@dtypes
def test_neighbours_of_one_sign_are_one_step(dtype):
    """Else 64 would not be enough for most rows. A logit that is split stays by itself."""
    steps = Steps(dtype).add(np.inf, 1).add(3, 1).add(2, -1).add(1, -1).add(0, 1)
    below, sign = routine("load_steps", dtype)(routine("save_steps", dtype)(*steps.arrays()))
    assert (below.tolist(), sign.tolist()) == ([np.inf, 2, 0], [1, -1, 1])
    split = Steps(dtype).add(np.inf, 1).add(3, 1, 1).add(3, -1, 1).add(2, -1)
    ours = routine("step_signs", dtype)(*split.arrays(), np.array([1, 2.5, 2.5, 1, 5], dtype))
    assert ours.tolist() == [-1, 1, -1, -1, 1]
