"""The exact selection of a row's k largest, against numpy and torch, on the instruction set of this process."""

import numpy as np
import pytest
import torch

probe = pytest.importorskip("mlot_kernels._probe", reason="built with MLOT_PROBE=1 alone")

EVERY_PATTERN = np.arange(1 << 16, dtype=np.uint16)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
WIDTHS = (1, 2, 15, 31, 32, 33, 63, 64, 65, 100, 1000, 4097, 20_000)


def row_of(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16) if x.element_size() == 2 else x.numpy()


def selected(x: torch.Tensor, k: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    columns = probe.select_largest(row_of(x), DTYPES[x.dtype], k, None if mask is None else mask.numpy())
    return torch.from_numpy(columns)


def expected(x: torch.Tensor, k: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    if mask is None:
        return x.sort(descending=True, stable=True).indices[:k]
    looked_at = mask.nonzero().squeeze(-1)
    order = looked_at[x[looked_at].sort(descending=True, stable=True).indices]
    return torch.cat((order, (~mask).nonzero().squeeze(-1)))[:k]


def rows(n: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    made = {
        "random": x,
        "ties": x.mul(2).round(),
        "ascending": x.sort().values,
        "descending": x.sort(descending=True).values,
        "all equal": torch.full((n,), -1.5),
        "zeros of both signs": torch.where(x > 0, 0.0, -0.0),
        "NaN": x.masked_fill(x > 1, float("nan")),
        "NaN of both signs": x.masked_fill(x > 1, float("nan")).masked_fill(x < -1, -float("nan")),
        "one NaN": x.index_fill(0, torch.tensor(n // 2), float("nan")),
        "mostly -inf": x.masked_fill(x < 1, float("-inf")),
        "all -inf": torch.full((n,), float("-inf")),
        "some inf": x.masked_fill(x > 1.5, float("inf")),
        "subnormal": x.mul(torch.finfo(dtype).smallest_normal / 4),
    }
    return {name: row.to(dtype) for name, row in made.items()}


def masks(n: int) -> list[torch.Tensor | None]:
    columns = torch.arange(n)
    return [None, columns % 7 == 3, columns % 3 > 0, columns < 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_of_every_16_bit_pattern_sort_as_the_numbers_do(dtype):
    values = torch.from_numpy(EVERY_PATTERN.view(np.int16)).view(dtype).double().numpy()
    keys = probe.sort_keys(EVERY_PATTERN, DTYPES[dtype])
    number = ~np.isnan(values)
    assert len(np.unique(keys[~number])) == 1
    assert keys[~number].min() > keys[number].max()
    order = np.argsort(values[number], kind="stable")
    value_steps, key_steps = np.diff(values[number][order]), np.diff(keys[number][order])
    assert (np.sign(value_steps) == np.sign(key_steps)).all()


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, np.uint32), (np.float64, np.uint64)])
def test_keys_of_wider_numbers_sort_as_they_do(dtype, bits):
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, np.iinfo(bits).max, 1_000_000, dtype=bits, endpoint=True).view(dtype)
    info = np.finfo(dtype)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, info.max, info.min, info.smallest_subnormal, info.tiny]
    values = np.concatenate((drawn, np.array(special, dtype=dtype), -np.array(special, dtype=dtype)))
    keys = probe.sort_keys(values, np.dtype(dtype).name)
    number = ~np.isnan(values)
    assert (~number).sum() > 4
    assert len(np.unique(keys[~number])) == 1
    assert keys[~number].min() > keys[number].max()
    order = np.argsort(values[number], kind="stable")
    ordered, key_steps = values[number][order], np.diff(keys[number][order])
    assert ((ordered[1:] > ordered[:-1]) == (key_steps > 0)).all()
    assert (key_steps >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize("n", WIDTHS)
def test_selection_is_a_stable_sort(dtype, n):
    for name, x in rows(n, dtype).items():
        for mask in masks(n):
            for k in sorted({1, min(2, n), min(50, n), min(300, n), min(4096, n), n}):
                assert torch.equal(selected(x, k, mask), expected(x, k, mask)), (name, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize("k", [1, 50, 1024, 2110, 2111, 4096, 151_936])
def test_selection_from_a_real_vocabulary(dtype, k):
    for x in (rows(151_936, dtype)[name] for name in ("random", "ties", "one NaN", "all equal")):
        assert torch.equal(selected(x, k), expected(x, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
def test_selection_from_a_row_at_any_address(dtype):
    x = rows(4097, dtype)["ties"]
    for start in range(1, 9):
        assert torch.equal(selected(x[start:], 70), expected(x[start:], 70))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_selection_from_every_16_bit_pattern(dtype):
    shuffled = np.random.default_rng(0).permutation(EVERY_PATTERN)
    keys = probe.sort_keys(shuffled, dtype)
    order = np.argsort(-keys, kind="stable")
    for k in (1, 254, 255, 4096, 1 << 16):
        np.testing.assert_array_equal(probe.select_largest(shuffled, dtype, k), order[:k])
