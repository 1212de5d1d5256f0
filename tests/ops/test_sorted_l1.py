import itertools

import pytest
import torch

from mlot_kernels import Logits, Rows, pair, sorted_l1, triton_tiles
from mlot_kernels.ops.sorted_l1 import reference
from tests.conftest import INTERPRETED, backends_of
from tests.properties import given, st

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = backends_of("sorted_l1")


@pytest.fixture
def fewer_tiles():
    """Triton's interpreter takes as long for a large tile as for a small one."""
    if not INTERPRETED:
        yield
        return
    kernels = [name for name in triton_tiles.TABLE.kernels if name.startswith("sorted_l1.")]
    with triton_tiles.overriding({name: {"BLOCK": 16_384} for name in kernels}):
        yield


def two_sorts(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """By two stable full sorts of probabilities, for autograd to differentiate."""
    p, q = (x.softmax(-1).sort(dim=-1, descending=True, stable=True).values for x in (student, teacher))
    width = max(p.shape[-1], q.shape[-1])
    p, q = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (p, q))
    return (p - q).abs().sum(-1)


def gradients(function, student, teacher):
    leaves = [x.clone().requires_grad_() for x in (student, teacher)]
    value = function(*leaves)
    (value * torch.arange(1.0, value.numel() + 1).view_as(value)).sum().backward()
    return value.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize(("V_s", "V_t"), [(40, 40), (40, 25), (25, 40), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_two_stable_sorts(V_s, V_t, dtype):
    student, teacher = torch.randn(2, 3, V_s, dtype=dtype) * 2, torch.randn(2, 3, V_t, dtype=dtype) * 2
    for ties in ("stable", "mean"):  # without ties the two are the same
        ours = gradients(lambda s, t, ties=ties: sorted_l1(s, t, ties=ties), student, teacher)
        for a, b in zip(ours, gradients(two_sorts, student, teacher), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ties_stable_are_those_of_a_stable_sort(dtype):
    student, teacher = (torch.randn(2, 4, V).mul(2).round().to(dtype) for V in (60, 50))
    ours = gradients(lambda s, t: sorted_l1(s, t, ties="stable"), student, teacher)
    expected = gradients(two_sorts, student.double(), teacher.double())
    for a, b in zip(ours, expected, strict=True):
        # equal values on both sides: their difference is rounding in either computation, and so is its sign
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2 * torch.finfo(dtype).eps + 1e-6)


def test_ties_mean_are_the_mean_over_all_orders():
    values = torch.tensor([1.0, 1.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    teacher = torch.tensor([[1.4, 0.9, 0.2, 0.1]], dtype=torch.float64)
    ours = gradients(sorted_l1, values[None], teacher)
    total = torch.zeros(5, dtype=torch.float64)
    orders = list(itertools.permutations(range(3)))
    for order in orders:
        permutation = torch.tensor([*order, 3, 4])
        by_order = gradients(two_sorts, values[permutation][None], teacher)[1][0]
        total[permutation] += by_order
    torch.testing.assert_close(ours[1][0], total / len(orders))
    stable = gradients(lambda s, t: sorted_l1(s, t, ties="stable"), values[None], teacher)
    assert not torch.allclose(stable[1], ours[1])  # the run is crossed, else this shows nothing


def test_is_the_wasserstein_distance_of_the_values():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is the oracle here")
    student, teacher = torch.randn(1, 50, dtype=torch.float64), torch.randn(1, 50, dtype=torch.float64)
    expected = 50 * stats.wasserstein_distance(student[0].softmax(-1), teacher[0].softmax(-1))
    assert sorted_l1(student, teacher).item() == pytest.approx(expected)


@given(st.integers(0, 10_000), st.integers(1, 12))
def test_top_k(seed, k):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(1, 3, V, generator=generator).double() * 2 for V in (9, 11))
    p, q = (x.softmax(-1).sort(dim=-1, descending=True).values for x in (student, teacher))
    p = torch.nn.functional.pad(p, (0, 2))
    head = (p[..., :k] - q[..., :k]).abs().sum(-1)
    tail = (p[..., k:] - q[..., k:]).sum(-1).abs()
    torch.testing.assert_close(sorted_l1(student, teacher, top_k=k, tail="drop"), head)
    bucket = sorted_l1(student, teacher, top_k=k)
    torch.testing.assert_close(bucket, head + tail)
    whole = sorted_l1(student, teacher)
    assert (bucket <= whole + 1e-12).all()
    signs = (p[..., k:] - q[..., k:]).sign()
    uncrossed = (signs == signs[..., :1]).all(-1) if k < 11 else torch.ones_like(whole, dtype=torch.bool)
    torch.testing.assert_close(bucket[uncrossed], whole[uncrossed])


@given(st.integers(0, 10_000))
def test_the_order_of_either_vocabulary_changes_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(1, 2, V, generator=generator).double().mul(2).round() for V in (14, 11))
    order = torch.randperm(14, generator=generator)
    plain = gradients(sorted_l1, student, teacher)
    permuted = gradients(sorted_l1, student[..., order], teacher[..., torch.randperm(11, generator=generator)])
    torch.testing.assert_close(permuted[0], plain[0])
    torch.testing.assert_close(permuted[1], plain[1][..., order], atol=1e-6, rtol=0)


def test_is_symmetric_and_between_0_and_2():
    student, teacher = torch.randn(2, 3, 20) * 5, torch.randn(2, 3, 30) * 0.1
    torch.testing.assert_close(sorted_l1(student, teacher), sorted_l1(teacher, student))
    assert (sorted_l1(student, teacher) <= 2).all()
    assert (sorted_l1(student, student) == 0).all()
    one_hot = torch.zeros(1, 1, 10_000)
    one_hot[..., 3] = 200
    assert sorted_l1(one_hot, torch.zeros(1, 1, 10_000)).item() == pytest.approx(2, rel=1e-3)


def test_columns_left_out_are_not_there():
    student, teacher = torch.randn(1, 2, 12), torch.randn(1, 2, 10)
    columns = torch.arange(12) % 3 > 0
    kept = torch.nn.functional.pad(student.softmax(-1)[..., columns], (0, 2))
    expected = (kept.sort(descending=True).values - teacher.softmax(-1).sort(descending=True).values).abs().sum(-1)
    torch.testing.assert_close(sorted_l1(Logits(student, columns=columns), teacher), expected)


def test_paired_rows_and_rows_that_are_no_pair():
    student, teacher = torch.randn(1, 4, 9), torch.randn(1, 5, 9)
    rows = Rows.from_mask(torch.tensor([[True, True, False, True]])), Rows.every(1, 5)
    pairs = pair(*rows)
    assert pairs.mismatched.all()  # two spans against one
    pairs = pair(Rows.from_mask(torch.tensor([[True, True, False, True]]), spans="one"), rows[1])
    loss = sorted_l1(Logits(student, pairs.student), Logits(teacher, pairs.teacher))
    torch.testing.assert_close(loss[0, :3], two_sorts(student[0, [0, 1, 3]], teacher[0, :3]))
    assert loss[0, 3] == 0
    loose = sorted_l1(Logits(student, Rows.every(1, 4)), Logits(teacher[:, :4], rows[0]))
    assert loose.isnan().tolist() == [[False, False, False, True]]


def test_a_side_that_needs_no_gradient_gets_none():
    student, teacher = torch.randn(1, 2, 5, requires_grad=True), torch.randn(1, 2, 6)
    sorted_l1(student, teacher).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_the_two_sides_may_differ_in_dtype():
    student, teacher = torch.randn(1, 2, 5, dtype=torch.bfloat16, requires_grad=True), torch.randn(1, 2, 6).double()
    loss = sorted_l1(student, teacher)
    loss.sum().backward()
    assert (loss.dtype, student.grad.dtype) == (torch.float64, torch.bfloat16)


def _hard_rows(kind: str, V: int, generator: torch.Generator) -> torch.Tensor:
    """[1, 2, V]: rows on which counting and binning may go wrong."""
    x = torch.randn(1, 2, V, generator=generator)
    if kind == "near uniform":
        return x * 0.02
    if kind == "ties everywhere":
        return (x * 2).round()
    if kind == "all equal":
        return torch.full_like(x, 1.5)
    if kind == "one hot":
        x = x * 0.01
        x[..., 7] = 30
        return x
    if kind == "-inf":
        x[..., ::3] = float("-inf")
        return x * 2
    return {"offset": x * 2 + 300, "underflow": x * 60}.get(kind, x * 2)


KINDS = ("usual", "near uniform", "ties everywhere", "all equal", "one hot", "-inf", "offset", "underflow")


@pytest.mark.parametrize("ties", ["mean", "stable"])
@pytest.mark.parametrize("dtypes", [*zip(DTYPES, DTYPES, strict=True), *itertools.pairwise(DTYPES)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_rows_are_exact(backend, dtypes, ties, fewer_tiles):
    generator = torch.Generator().manual_seed(5)
    kinds = [*zip(KINDS, KINDS, strict=True), ("all equal", "usual"), ("near uniform", "one hot")]
    for kind, other in kinds:
        sides = [_hard_rows(k, V, generator).to(d) for k, V, d in zip((kind, other), (2503, 2100), dtypes, strict=True)]
        for options in ({}, {"top_k": 300, "tail": "bucket" if ties == "mean" else "drop"}):
            ours = gradients(lambda s, t, o=options: sorted_l1(s, t, ties=ties, backend=backend, **o), *sides)
            expected = gradients(
                lambda s, t, o=options: sorted_l1(s, t, ties=ties, backend="reference", **o),
                *(x.double() for x in sides),
            )
            # float32 sums of 2,503 probabilities are good to a few last places of 1
            tolerance = 1e-13 if set(dtypes) == {torch.float64} else 4e-6 if backend == "reference" else 1e-6
            torch.testing.assert_close(ours[0].double(), expected[0], rtol=tolerance, atol=tolerance, msg=kind)
            for own, truth, x in zip(ours[1:], expected[1:], sides, strict=True):
                largest = 2 * x.double().softmax(-1).amax(-1, keepdim=True)  # upstream gradients reach 2
                eps = 0 if x.dtype == torch.float64 else torch.finfo(x.dtype).eps
                wrong = (own.double() - truth).abs() > (4 * tolerance + 2 * eps) * largest
                # probabilities that differ by rounding may have either sign: a few ranks beside a crossing
                assert wrong.sum() <= (0 if tolerance < 1e-10 else 8), (kind, other, options, int(wrong.sum()))


def _crossing_rows(kind: str, generator: torch.Generator) -> list[torch.Tensor]:
    """Two sides [1, 2, 40_000] of one distribution, whose order of ranks changes sides hundreds of times."""
    student, teacher = torch.randn(2, 1, 2, 40_000, generator=generator)
    if kind == "near uniform":
        return [student * 0.02, teacher * 0.02]
    if kind == "few crowded bins":  # 16 narrow heaps, far from each other
        heaps = torch.randint(16, student.shape, generator=generator) * 0.8
        return [heaps + student * 1e-5, heaps + teacher * 1e-5]
    if kind == "almost itself":
        return [student * 2, student * 2 + 1e-4 * teacher]
    return [student * 2, student * 2]  # itself


@pytest.mark.parametrize("kind", ["near uniform", "few crowded bins", "almost itself", "itself"])
@pytest.mark.parametrize("options", [{}, {"ties": "stable", "top_k": 9_000, "tail": "bucket"}], ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [*((a, a) for a in (torch.float32, torch.float16, torch.float64)), (torch.float32, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_rows_that_cross_often_are_exact(backend, dtypes, options, kind, fewer_tiles):
    sides = [x.to(d) for x, d in zip(_crossing_rows(kind, torch.Generator().manual_seed(6)), dtypes, strict=True)]
    columns = torch.rand(40_000, generator=torch.Generator().manual_seed(7)) < 0.9
    for mask in (None, columns):
        ours, expected = (
            gradients(
                lambda s, t, b=b, m=mask: sorted_l1(Logits(s, columns=m), Logits(t, columns=m), backend=b, **options),
                *x,
            )
            for b, x in ((backend, sides), ("reference", [x.double() for x in sides]))
        )
        exact = set(dtypes) == {torch.float64}
        torch.testing.assert_close(ours[0].double(), expected[0], rtol=0, atol=1e-13 if exact else 1e-6)
        # Elsewhere p and q are often neighbouring float32 numbers, and rounding chooses the sign: see the next test.
        if not exact and (kind, options) != ("near uniform", {}):
            continue
        for own, truth, x in zip(ours[1:], expected[1:], sides, strict=True):
            p = 2 * x.double().softmax(-1)  # upstream gradients reach 2; a wrong sign is an error of p
            wrong = ((own.double() - truth).abs() > (1e-11 if exact else 0.05) * p).double().mean()
            assert wrong <= (0 if exact else 0.02), float(wrong)


@pytest.mark.parametrize("kind", ["near uniform", "few crowded bins", "almost itself"])
@pytest.mark.parametrize("ties", ["mean", "stable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sign_is_another_only_where_rounding_chooses_it(backend, dtype, ties, kind, fewer_tiles):
    """Where two sorted probabilities agree to a few last places of their logarithm, float32 may find either larger: the
    loss is none the worse, but gradients differ by up to 2 p there, and by the sum of these everywhere."""
    sides = [x[:, :1, :1500].to(dtype) for x in _crossing_rows(kind, torch.Generator().manual_seed(6))]
    leaves = [x.clone().requires_grad_() for x in sides]
    scales = [torch.zeros(1, 1, dtype=dtype, requires_grad=True) for _ in sides]
    student, teacher = (Logits(x, log_scale=scale) for x, scale in zip(leaves, scales, strict=True))
    loss = sorted_l1(student, teacher, ties=ties, backend=backend)
    gradients = torch.autograd.grad(loss.sum(), [*leaves, *scales])  # s p - p sum(s p), and sum(s p)
    p = [x.double().softmax(-1) for x in sides]
    orders = [x.argsort(descending=True, stable=True) for x in sides]
    difference = torch.sub(*(x.gather(-1, order).log() for x, order in zip(p, orders, strict=True)))
    allowed = 4e-6 if dtype == torch.float32 else 1e-13  # 34 last places of 1; of log p = -17 they are 2
    for i, direction in enumerate((1, -1)):
        own = (gradients[i].double() / p[i] + gradients[2 + i][..., None].double()).gather(-1, orders[i])
        least, most = ((direction * difference + error).sign() for error in (-allowed, allowed))
        if ties == "mean":
            key = sides[i].gather(-1, orders[i])
            least, most = (reference._mean_over_ties(sign, key) for sign in (least, most))
        assert ((own >= least - 1e-5) & (own <= most + 1e-5)).all()


@pytest.mark.skipif(not INTERPRETED, reason="counting and sorting are two ways of the Triton kernels")
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("options", [{}, {"ties": "stable", "top_k": 80}, {"top_k": 50}], ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["near uniform", "few crowded bins", "itself", "ties everywhere", "-inf"])
def test_counted_rows_have_the_signs_of_sorted_ones(kind, dtypes, options, backend, monkeypatch):
    from mlot_kernels.ops.sorted_l1 import triton_sides

    generator = torch.Generator().manual_seed(8)
    if kind in KINDS and kind != "near uniform":
        sides = [_hard_rows(kind, V, generator)[:, :1] for V in (400, 350)]
    else:
        sides = [x[:, :1, :V] for x, V in zip(_crossing_rows(kind, generator), (400, 350), strict=True)]
    sides = [x.to(d) for x, d in zip(sides, dtypes, strict=True)]
    results = []
    tiles = {"count": 16_384, "list": 16_384, "walk": 128, "order_again": 2048}  # of 65,536 counters, and of 400 ranks
    for first in (1, 10_000):
        monkeypatch.setattr(triton_sides, "COUNTED_FROM", first)
        with triton_tiles.overriding({f"sorted_l1.{kernel}": {"BLOCK": size} for kernel, size in tiles.items()}):
            results.append(gradients(lambda s, t: sorted_l1(s, t, backend=backend, **options), *sides))
    for counted, by_sort in zip(*results, strict=True):  # another sign would change an element by twice its p
        eps = torch.finfo(counted.dtype).eps
        torch.testing.assert_close(counted, by_sort, rtol=2 * eps if eps > 1e-6 else 1e-5, atol=1e-7)


@pytest.mark.skipif(not INTERPRETED, reason="so many rows at a time are counted by the Triton kernels alone")
@pytest.mark.parametrize("backend", ["triton"])
def test_pairs_are_counted_two_at_a_time_and_sorted_where_lists_are_too_short(backend, monkeypatch, fewer_tiles):
    from mlot_kernels.ops.sorted_l1 import triton_sides

    student, teacher = torch.randn(2, 1, 5, 17_000, generator=torch.Generator().manual_seed(9)) * 2
    teacher[:, 1] = student[:, 1]  # no bin tells anything of such a pair, and 16,384 items have room
    rows = Rows.from_mask(torch.tensor([[True, True, True, False, True]]), spans="one")
    monkeypatch.setattr(triton_sides, "COUNTED_PAIRS", 2)
    results = []
    for first in (1, 100_000):
        monkeypatch.setattr(triton_sides, "COUNTED_FROM", first)
        results.append(
            gradients(lambda s, t: sorted_l1(Logits(s, rows), Logits(t, rows), backend=backend), student, teacher)
        )
    for counted, by_sort in zip(*results, strict=True):
        torch.testing.assert_close(counted, by_sort, rtol=1e-5, atol=1e-7)
    assert results[0][0][0, 1] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_rows_have_the_gradient_of_their_counts(backend, dtype, fewer_tiles):
    """One run meets 2000 larger and 1000 smaller probabilities: the mean sign is -1/3; under ``"stable"`` the first
    columns meet the larger ones."""
    student = torch.zeros(1, 3000, dtype=dtype)  # p = 1 / 3000 throughout
    teacher = torch.zeros(1, 3000, dtype=dtype)
    teacher[:, :2000] = 1
    p = 1 / 3000
    for ties, sign in (("mean", torch.full((3000,), -1 / 3)), ("stable", 1 - 2 * (torch.arange(3000) < 2000).double())):
        _, gradient, _ = gradients(
            lambda s, t, ties=ties: sorted_l1(s, t, ties=ties, backend=backend), student, teacher
        )
        expected = p * (sign.double() + 1 / 3)
        torch.testing.assert_close(gradient[0].double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_against_itself_costs_nothing(backend, dtype, fewer_tiles):
    x = torch.randn(2, 3000, generator=torch.Generator().manual_seed(1)).to(dtype)
    loss, *both = gradients(lambda s, t: sorted_l1(s, t, backend=backend), x, x.clone())
    assert (loss == 0).all()
    assert all((gradient == 0).all() for gradient in both)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_small_counts_on_hard_rows(backend, dtype, fewer_tiles):
    """2,000 and more values of one sign, of which hundreds vanish beside a float32 sum of those before them."""
    x = torch.randn(1, 30_000, generator=torch.Generator().manual_seed(0)).mul(8).to(dtype)
    of = [(x, backend), (x.double(), "reference")]
    loss, truth = (sorted_l1(Logits(z), Logits(z, temperature=2.0), backend=b) for z, b in of)
    # 2e-6 and not the contract's 1e-6: of 32 threads, which only tests have, each adds a thousand terms in float32.
    assert loss.sub(truth).abs() <= (2e-6 if loss.dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_columns_of_long_rows(backend, dtype, fewer_tiles):
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(1, 2, V, generator=generator).mul(2).to(dtype) for V in (4500, 4000))
    columns = torch.rand(4500, generator=generator) < 0.5
    for ties in ("mean", "stable"):
        results = [
            gradients(
                lambda s, t, b=b, ties=ties: sorted_l1(
                    Logits(s, columns=columns, vocab_size=4300, standardize=True), t, ties=ties, backend=b
                ),
                *(x.to(d) for x in (student, teacher)),
            )
            for b, d in ((backend, dtype), ("reference", torch.float64))
        ]
        for own, truth in zip(*results, strict=True):
            tolerance = 2e-6 + (2 * torch.finfo(dtype).eps if own.dtype == dtype else 0)
            error = (own.double() - truth).abs().amax(-1) / truth.abs().amax(-1)
            assert (error <= tolerance).all(), error


X = torch.randn(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: sorted_l1(X, X[:, :2]), ValueError, r"rows of the same shape .*match them with mlot_kernels.pair"),
        (lambda: sorted_l1(X, X[:1]), ValueError, "rows of the same shape"),
        (lambda: sorted_l1(X.long(), X), TypeError, "student.values must be one of"),
        (lambda: sorted_l1(X, "teacher"), TypeError, "teacher must be a tensor or Logits"),
        (lambda: sorted_l1(X, X.to("meta")), ValueError, "student on cpu, teacher on meta"),
        (lambda: sorted_l1(X, X, ties="first"), ValueError, "ties must be one of 'mean', 'stable', got 'first'"),
        (lambda: sorted_l1(X, X, tail="ignore"), ValueError, "tail must be one of 'bucket', 'drop'"),
        (lambda: sorted_l1(X, X, top_k=0), ValueError, "top_k must be at least 1"),
        (lambda: sorted_l1(X, X, top_k=2.5), TypeError, "top_k must be an int"),
        (lambda: sorted_l1(X, X, k=2), TypeError, "k"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
