import sys

import pytest
import torch

from mlot_kernels import Logits, Ranked, Rows, gather_columns, match_columns, pair, rank_truncate, use_backend
from tests.conftest import backends_of
from tests.properties import given, st

METHODS = ("greedy", "optimal")
BACKENDS = backends_of("match_columns")
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is missing")


@pytest.fixture(params=BACKENDS)
def backends(request):
    """Each in turn; the other operators that these tests call have them all, too."""
    with use_backend(request.param):
        yield request.param


def costs(student, teacher):
    """D ``[k, V]`` of the counted rows' probabilities ``[N, V]`` and ``[N, k]``."""
    return (teacher[:, :, None] - student[:, None, :]).abs().sum(0)


def by_a_loop(D):
    free, columns = list(range(D.shape[1])), []
    for row in D.tolist():
        best = free[0]
        for j in free:
            if row[j] < row[best]:
                best = j
        free.remove(best)
        columns.append(best)
    return columns


def total(D, columns):
    return D[torch.arange(len(columns)), columns].sum()


def ranked(log_p):
    """``log_p`` ``[B, A, k]`` as a teacher."""
    return Ranked(log_p[None], torch.zeros_like(log_p.sum(-2), dtype=torch.int64), torch.zeros_like(log_p.sum(-1)))


@on_every_backend
@given(st.integers(0, 10_000), st.data())
def test_equals_a_plain_loop_and_scipy(backend, seed, data):
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is the oracle here")
    generator = torch.Generator().manual_seed(seed)
    B, T, V = (data.draw(st.integers(1, most)) for most in (3, 5, 12))
    k = data.draw(st.integers(1, V))
    flags = st.lists(st.booleans(), min_size=T, max_size=T)
    rows = Rows.from_mask(torch.tensor(data.draw(st.lists(flags, min_size=B, max_size=B))))
    x = torch.randn(B, T, V, generator=generator, dtype=torch.float64) * 2
    teacher = torch.randn(B, T, k + 3, generator=generator, dtype=torch.float64).log_softmax(-1)[..., :k]
    temperature = data.draw(st.floats(0.3, 3))
    greedy, optimal = (
        match_columns(Logits(x, rows, temperature), ranked(teacher), method=method, backend=backend)
        for method in METHODS
    )
    for b in range(B):
        n = int(rows.count[b])
        D = costs((x[b, rows.index[b, :n]] / temperature).softmax(-1), teacher[b, :n].exp())
        assert greedy[b].tolist() == by_a_loop(D)
        least = total(D, optimize.linear_sum_assignment(D.numpy())[1])
        assert len(set(optimal[b].tolist())) == k
        torch.testing.assert_close(total(D, optimal[b]), least)
        assert total(D, optimal[b]) <= total(D, greedy[b]) + 1e-12


# Columns below, at and above a block and a panel; rows below, at and above a partial sum; k below and above a tile.
@needs_cpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("rows", "width", "k"), [(1, 1, 1), (3, 255, 4), (64, 256, 5), (65, 257, 16), (7, 530, 33)], ids=str
)
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float64), (torch.float16, torch.float32)],
    ids=str,
)
def test_odd_sizes_and_mixed_dtypes_equal_the_definition(dtypes, rows, width, k, method):
    x = (2 * torch.randn(2, rows, width)).to(dtypes[0])
    teacher = torch.randn(2, rows, k + 2).log_softmax(-1)[..., :k].to(dtypes[1])
    cpu, plain = (match_columns(x, ranked(teacher), method=method, backend=backend) for backend in BACKENDS[::-1])
    for b in range(2):
        D = costs(x[b].double().softmax(-1), teacher[b].double().exp())
        assert len(set(cpu[b].tolist())) == k
        torch.testing.assert_close(total(D, cpu[b]), total(D, plain[b]), rtol=1e-5, atol=1e-6)


@needs_cpu
@pytest.mark.parametrize("method", METHODS)
def test_threads_and_batch_mates_change_no_column(method):
    x, teacher = torch.zeros(3, 9, 1500), torch.randn(3, 9, 40).log_softmax(-1)
    x[:, :, ::7] = torch.randn(3, 9, 215)  # the others tie
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(match_columns(x, ranked(teacher), method=method, backend="cpu"))
            alone = [match_columns(x[b : b + 1], ranked(teacher[b : b + 1]), method=method) for b in range(3)]
            found.append(torch.cat(alone))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other, found[0])


@needs_cpu
def test_the_greedy_choice_is_that_of_the_costs():
    """Ties within a block, across blocks, and in blocks that have lost their cheapest column."""
    x = torch.zeros(1, 2, 1100)
    x[..., 300], x[..., 900] = 3, 3
    x[..., [5, 700]] = 1
    teacher = torch.tensor([0.017, 0.017, 0.017, 0.0023, 0.0023, 0.0023, 0.0]).log().expand(1, 2, 7)
    columns = match_columns(x, ranked(teacher), backend="cpu")
    D = torch.ops.mlot_cpu.match_columns_costs(x, torch.arange(2)[None], None, None, 1.0, False, 1100, teacher)
    assert columns[0].tolist() == by_a_loop(D[0]) == [300, 900, 5, 700, 0, 1, 2]


def test_optimal_never_costs_more_than_each_side_by_its_own_sums():
    student, teacher = torch.randn(3, 6, 40) * 3, torch.randn(3, 6, 50) * 3
    t = rank_truncate(teacher, k=10)
    columns = match_columns(student, t, method="optimal")
    by_sums = rank_truncate(student, k=10).columns
    for b in range(3):
        D = costs(student[b].softmax(-1), t.log_probabilities[0, b].exp())
        assert total(D, columns[b]) <= total(D, by_sums[b]) + 1e-6


def test_optimal_is_cheaper_where_greed_pays_later():
    t = torch.tensor([[[0.4, 0.5]]], dtype=torch.float64)
    s = torch.tensor([[[0.42, 0.3, 0.28]]], dtype=torch.float64)  # greedy: 0.02 + 0.2, the other way 0.1 + 0.08
    assert match_columns(s.log(), ranked(t.log())).tolist() == [[0, 1]]
    assert match_columns(s.log(), ranked(t.log()), method="optimal").tolist() == [[1, 0]]


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_permuted_copy_is_found(method, dtype):
    teacher = (torch.randn(2, 5, 30) * 3).to(dtype)
    order = torch.randperm(30)
    t = rank_truncate(teacher, k=8)
    columns = match_columns(teacher[..., order].contiguous(), t, method=method)
    assert columns.dtype == torch.int64
    assert torch.equal(order[columns], t.columns)
    assert torch.equal(match_columns(teacher, t, method=method), t.columns)


@pytest.mark.usefixtures("backends")
def test_the_lower_index_comes_first_among_equals():
    x = torch.zeros(1, 3, 9)
    x[..., 4] = 1
    teacher = ranked(torch.full((1, 3, 3), 1 / 10).log())
    assert match_columns(x, teacher).tolist() == [[0, 1, 2]]
    x[..., 0] = 1
    assert match_columns(x, teacher).tolist() == [[1, 2, 3]]


@pytest.mark.usefixtures("backends")
def test_rows_that_do_not_count_take_no_part():
    x, teacher = torch.randn(2, 4, 12), torch.randn(2, 4, 5).log_softmax(-1)
    rows = Rows.from_mask(torch.tensor([[True, False, True, False], [True] * 4]))
    for method in METHODS:
        alone = match_columns(x[:1, [0, 2]], ranked(teacher[:1, :2]), method=method)
        bad_x, bad_teacher = x.clone(), teacher.clone()
        bad_x[0, 1::2] = float("nan")
        bad_teacher[0, 2:] = float("inf")  # the teacher's rows stand in the order of the student's counted ones
        columns = match_columns(Logits(bad_x, rows), ranked(bad_teacher), method=method)
        assert torch.equal(columns[:1], alone)
        assert torch.equal(columns[1:], match_columns(x[1:], ranked(teacher[1:]), method=method))


@pytest.mark.usefixtures("backends")
def test_takes_the_rows_that_pair_returns():
    student, teacher = torch.randn(2, 6, 20), torch.randn(2, 7, 25)
    rows = [Rows.from_mask(torch.rand(2, T) < 0.8, spans="one") for T in (6, 7)]
    pairs = pair(*rows)
    t = rank_truncate(Logits(teacher, pairs.teacher), k=5)
    columns = match_columns(Logits(student, pairs.student), t)
    for b in range(2):
        n = int(pairs.student.count[b])
        s = student[b, pairs.student.index[b, :n]].softmax(-1)
        assert columns[b].tolist() == by_a_loop(costs(s, t.log_probabilities[0, b, :n].exp()))


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("method", METHODS)
def test_only_columns_that_are_looked_at_are_taken(method):
    x, teacher = torch.randn(1, 3, 12), ranked(torch.randn(1, 3, 4).log_softmax(-1))
    mask = torch.arange(12) % 2 == 1
    taken = match_columns(Logits(x, vocab_size=9, columns=mask), teacher, method=method)[0].tolist()
    assert sorted(taken) == [1, 3, 5, 7]
    mask[3:] = False
    columns = match_columns(Logits(x, columns=mask), teacher, method=method)
    assert sorted(columns[0].tolist()) == [-1, -1, -1, 1]
    assert gather_columns(x, columns).log_probabilities[0, 0].isnan().sum(-1).tolist() == [3, 3, 3]


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_logits(method):
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is the oracle here")
    x = torch.randn(2, 4, 14, dtype=torch.float64)
    scale = -torch.rand(2, 4, dtype=torch.float64)
    columns = torch.arange(14) % 3 > 0
    teacher = torch.randn(2, 4, 5, dtype=torch.float64).log_softmax(-1)
    matched = match_columns(Logits(x, None, 0.7, True, 11, columns, scale), ranked(teacher), method=method)
    z = x[..., :11]
    s = (z / (0.7 * (z.std(-1, keepdim=True) + 1e-4))).softmax(-1) * scale.exp()[..., None]
    free = columns[:11].nonzero().squeeze(1)
    for b in range(2):
        D = costs(s[b][:, free], teacher[b].exp())
        expected = by_a_loop(D) if method == "greedy" else optimize.linear_sum_assignment(D.numpy())[1]
        torch.testing.assert_close(total(D, torch.searchsorted(free, matched[b])), total(D, expected))
        assert set(matched[b].tolist()) <= set(free.tolist())


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_nan_leaves_its_sequence_without_columns(method, side):
    x, teacher = torch.randn(2, 3, 12), torch.randn(2, 3, 5).log_softmax(-1)
    sound = match_columns(x, ranked(teacher), method=method)
    (x if side == "student" else teacher)[0, 1, 2] = float("nan")
    columns = match_columns(x, ranked(teacher), method=method)
    assert (columns[0] == -1).all()
    assert torch.equal(columns[1], sound[1])
    assert gather_columns(x, columns).log_probabilities[0].isnan().flatten(1).all(1).tolist() == [True, False]


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("method", METHODS)
def test_probabilities_of_zero_are_compared_as_such(method):
    x, teacher = torch.randn(1, 3, 8), torch.randn(1, 3, 3).log_softmax(-1)
    x[..., 4:] = float("-inf")
    teacher[..., 1:] = float("-inf")
    columns = match_columns(x, ranked(teacher), method=method)[0].tolist()
    assert columns[1:] == [4, 5] or (method == "optimal" and set(columns[1:]) <= {4, 5, 6, 7})


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("method", METHODS)
def test_without_a_counted_row_the_first_columns_are_taken(method):
    x = torch.full((2, 3, 7), float("nan"))
    rows = Rows.from_mask(torch.zeros(2, 3, dtype=torch.bool))
    teacher = ranked(torch.full((2, 3, 4), float("nan")))
    assert match_columns(Logits(x, rows), teacher, method=method).tolist() == [[0, 1, 2, 3]] * 2
    mask = torch.arange(7) > 1
    assert match_columns(Logits(x, rows, columns=mask), teacher, method=method).tolist() == [[2, 3, 4, 5]] * 2
    assert match_columns(torch.zeros(0, 3, 7), ranked(torch.zeros(0, 3, 4)), method=method).shape == (0, 4)
    assert match_columns(torch.zeros(2, 0, 7), ranked(torch.zeros(2, 0, 2)), method=method).tolist() == [[0, 1]] * 2


@pytest.mark.usefixtures("backends")
def test_one_sequence_loses_its_batch_dimension():
    x, y = torch.randn(4, 9), torch.randn(4, 11)
    for method in METHODS:
        flat = match_columns(x, rank_truncate(y, k=3, also_at=(2.0,)), method=method)
        assert torch.equal(flat, match_columns(x[None], rank_truncate(y[None], k=3), method=method)[0])


@pytest.mark.usefixtures("backends")
def test_only_the_first_temperature_is_compared():
    x, y = torch.randn(2, 4, 9), torch.randn(2, 4, 11)
    plain, more = (rank_truncate(Logits(y, temperature=0.5), k=3, also_at=also_at) for also_at in ((), (3.0, 9.0)))
    assert torch.equal(match_columns(x, more), match_columns(x, plain))


@given(st.integers(0, 10_000))
def test_permuting_the_vocabulary_permutes_the_columns(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 20, dtype=torch.float64, generator=generator)
    teacher = ranked(torch.randn(2, 3, 6, dtype=torch.float64, generator=generator).log_softmax(-1))
    order = torch.randperm(20, generator=generator)
    permuted = x[..., order].contiguous()
    assert torch.equal(order[match_columns(permuted, teacher)], match_columns(x, teacher))
    optimal = match_columns(x, teacher, method="optimal")
    again = order[match_columns(permuted, teacher, method="optimal")]
    for b in range(2):  # assignments of one cost are no rarity: where differences agree in sign, L1 lets them cross
        D = costs(x[b].softmax(-1), teacher.log_probabilities[0, b].exp())
        torch.testing.assert_close(total(D, again[b]), total(D, optimal[b]))


@given(st.integers(0, 10_000))
def test_an_assignment_costs_the_same_in_any_order_of_the_teachers_columns(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 3, 15, dtype=torch.float64, generator=generator)
    teacher = torch.randn(1, 3, 6, dtype=torch.float64, generator=generator).log_softmax(-1)
    order = torch.randperm(6, generator=generator)
    plain = match_columns(x, ranked(teacher), method="optimal")[0]
    again = match_columns(x, ranked(teacher[..., order]), method="optimal")[0]
    D = costs(x[0].softmax(-1), teacher[0].exp())
    torch.testing.assert_close(total(D[order], again), total(D, plain))


def test_columns_are_constants():
    x, y = torch.randn(2, 3, 9, requires_grad=True), torch.randn(2, 3, 9, requires_grad=True)
    assert not match_columns(x, rank_truncate(y, k=3)).requires_grad


def test_without_scipy_optimal_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    x = torch.randn(2, 3, 5)
    with pytest.raises(ImportError, match=r"method='optimal' needs SciPy: pip install 'mlot-kernels\[optimal\]'"):
        match_columns(x, rank_truncate(x, k=2), method="optimal")
    match_columns(x, rank_truncate(x, k=2))


X = torch.randn(2, 3, 5)
T = rank_truncate(torch.randn(2, 3, 9), k=4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: match_columns(X, X), TypeError, "teacher must be Ranked, got Tensor; make it with rank_truncate"),
        (lambda: match_columns("X", T), TypeError, "student must be a tensor or Logits, got str"),
        (lambda: match_columns(X, T, method="best"), ValueError, "method must be one of 'greedy', 'optimal'"),
        (lambda: match_columns(X, T, k=3), TypeError, "k"),
        (
            lambda: match_columns(Logits(X, vocab_size=3), T),
            ValueError,
            r"k must be at least 1 and at most 3 \(the student's vocabulary\), got 4",
        ),
        (
            lambda: match_columns(X[:, :2], T),
            ValueError,
            r"teacher.log_probabilities must be \[R, B, A, k\] with the student's rows, \(1, 2, 2, 4\) here",
        ),
        (
            lambda: match_columns(X[0], T),
            ValueError,
            r"teacher.log_probabilities must be \[R, A, k\], got \(1, 2, 3, 4\)",
        ),
        (
            lambda: match_columns(X, rank_truncate(X, k=4, scope="token")),
            ValueError,
            r"the same for all rows of a sequence, got shape \(2, 3, 4\); rank with scope='sequence'",
        ),
        (
            lambda: match_columns(X, T._replace(log_probabilities=T.log_probabilities[:0])),
            ValueError,
            "the number of the teacher's temperatures must be at least 1, got 0",
        ),
        (
            lambda: match_columns(X, T._replace(log_probabilities=T.log_probabilities.long())),
            TypeError,
            "teacher.log_probabilities must be one of",
        ),
        (lambda: match_columns(X, T._replace(columns=None)), TypeError, "teacher.columns must be a tensor"),
        (
            lambda: match_columns(X, T._replace(log_probabilities=T.log_probabilities.to("meta"))),
            ValueError,
            "student on cpu, teacher on meta",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
