import math

import pytest
import torch
import torch.nn.functional as F

from mlot_kernels import Logits, Rows, row_divergence
from mlot_kernels.ops.row_divergence.reference import KINDS
from tests.conftest import HAS_SCIPY, backends_of
from tests.properties import given, st

by_backend = pytest.mark.parametrize("backend", backends_of("row_divergence"))
by_kind = pytest.mark.parametrize("kind", KINDS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randn(shape) * 2).to(dtype), (torch.randn(shape) * 2).to(dtype)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """sum p log(p / q), by torch's own loss."""
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


@by_backend
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.floats(0.05, 0.95), st.floats(0.0, 0.95))
def test_is_torchs_kl_div(backend, B, T, V, beta, skew):
    student, teacher = pair(B, T, V)
    q, p = student.softmax(-1), teacher.softmax(-1)
    m = beta * p + (1 - beta) * q
    expected = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m),
        "total_variation": (p - q).abs().sum(-1) / 2,
        "skew_kl": kl(p, skew * p + (1 - skew) * q),
        "skew_reverse_kl": kl(q, (1 - skew) * p + skew * q),
    }
    for kind, value in expected.items():
        ours = row_divergence(student, teacher, kind=kind, beta=beta, skew=skew, backend=backend)
        torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not HAS_SCIPY, reason="SciPy is the oracle; pip install 'mlot-kernels[test]'")
@by_backend
def test_jsd_is_scipys_distance_squared(backend):
    from scipy.spatial.distance import jensenshannon

    student, teacher = pair(2, 3, 50)
    expected = jensenshannon(student.softmax(-1).numpy(), teacher.softmax(-1).numpy(), axis=-1) ** 2
    torch.testing.assert_close(row_divergence(student, teacher, kind="jsd", backend=backend), torch.tensor(expected))


def adaptive(p: list[float], q: list[float], head: float) -> float:
    """By a sort and a loop, as the paper words it."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    mass, in_head = 0.0, set()
    for i in order:
        in_head.add(i)
        mass += p[i]
        if mass > head:
            break
    gaps = [abs(a - b) for a, b in zip(p, q, strict=True)]
    share = sum(gaps[i] for i in in_head) / sum(gaps)
    forward_kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    reverse_kl = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    return share * forward_kl + (1 - share) * reverse_kl


@by_backend
@given(st.integers(2, 30), st.floats(0.0, 0.99))
def test_adaptive_kl_is_the_papers(backend, V, head):
    student, teacher = pair(1, 2, V)
    ours = row_divergence(student, teacher, kind="adaptive_kl", head=head, backend=backend)
    for a in range(2):
        expected = adaptive(teacher[0, a].softmax(-1).tolist(), student[0, a].softmax(-1).tolist(), head)
        assert ours[0, a].item() == pytest.approx(expected, rel=1e-9)


@by_backend
def test_the_order_of_the_vocabulary_does_not_matter_where_equals_cross_the_heads_end(backend):
    teacher = torch.tensor([[[2.0, 1, 1, 1, 1, 0]]], dtype=torch.float64)
    student = torch.randn(1, 1, 6, dtype=torch.float64)
    order = torch.tensor([4, 0, 2, 5, 3, 1])
    one, other = (
        row_divergence(s, t, kind="adaptive_kl", head=0.6, backend=backend)
        for s, t in ((student, teacher), (student[..., order], teacher[..., order]))
    )
    torch.testing.assert_close(one, other)


@by_backend
@by_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_rows_have_0_and_gradient_0_exactly(dtype, kind, backend):
    x = (torch.randn(2, 3, 3000) * 3).to(dtype)
    x[0, 0, ::3] = float("-inf")
    for options in ({}, {"temperature": 1.7, "standardize": True}, {"log_scale": -torch.rand(2, 3)}):
        student, teacher = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss = row_divergence(Logits(student, **options), Logits(teacher, **options), kind=kind, backend=backend)
        loss.sum().backward()
        assert (loss == 0).all()
        assert (student.grad == 0).all()
        assert (teacher.grad == 0).all()


@by_backend
def test_interpolated_equal_rows_have_0_and_gradient_0_exactly(backend):
    x = torch.randn(2, 3, 700).requires_grad_()
    loss = row_divergence(x, x.detach().clone(), interpolation=0.3, backend=backend)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (x.grad == 0).all()


@by_backend
@by_kind
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_near_equal_rows_keep_their_digits(dtype, kind, backend):
    """Of a divergence that is no larger than the last places of the probabilities' sum."""
    teacher = torch.randn(1, 40, 5000) * 2
    student = (teacher + 1e-3 * torch.randn_like(teacher)).to(dtype)
    teacher = teacher.to(dtype)
    loss = row_divergence(student, teacher, kind=kind, backend=backend)
    truth = row_divergence(student.double(), teacher.double(), kind=kind, backend="reference")
    assert (loss >= 0).all()
    torch.testing.assert_close(loss.double(), truth, rtol=0.1, atol=0)


@by_backend
def test_interpolation_is_taids(backend):
    student, teacher = pair(2, 3, 30)
    leaf = student.clone().requires_grad_()
    ours = row_divergence(Logits(leaf, temperature=2.0), teacher, interpolation=0.3, backend=backend)
    p = (0.7 * student / 2 + 0.3 * teacher).softmax(-1)
    twin = student.clone().requires_grad_()
    expected = F.kl_div((twin / 2).log_softmax(-1), p, reduction="none").sum(-1)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y, x in ((ours, leaf), (expected, twin))))


def floored_jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float, floor: float) -> torch.Tensor:
    """Of probabilities that need not add up to 1, as TRL's GOLD trainer takes them."""
    q, p = (x.clamp_min(floor).log() for x in (student, teacher))
    if beta in (0, 1):
        one, other = (q, p) if beta == 0 else (p, q)
        return F.kl_div(one, other, reduction="none", log_target=True).sum(-1)
    m = torch.stack((q + math.log(1 - beta), p + math.log(beta))).logsumexp(0)
    of_p, of_q = (F.kl_div(m, x, reduction="none", log_target=True).sum(-1) for x in (p, q))
    return beta * of_p + (1 - beta) * of_q


@by_backend
@pytest.mark.parametrize("floor", [1e-8, 0.03])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layout", ["all", "masks", "pairs", "pairs and masks"])
def test_a_floor_is_trls_clamp(layout, beta, floor, backend):
    """Values and gradients, the log scales' among them; of both sides columns lie below either floor."""
    student, teacher = ((x * 5).requires_grad_() for x in pair(2, 3, 40))
    with torch.no_grad():
        student[..., 7], teacher[..., [7, 8]] = float("-inf"), float("-inf")
    scales = [(-torch.rand(2, 3, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    masks = [torch.rand(40) < 0.7 if "masks" in layout else torch.ones(40, dtype=torch.bool) for _ in range(2)]
    pairs = torch.randint(40, (60, 2)) if "pairs" in layout else torch.arange(40)[:, None].expand(40, 2)
    sides = [
        Logits(x, log_scale=scale, columns=mask if "masks" in layout else None)
        for x, scale, mask in zip((student, teacher), scales, masks, strict=True)
    ]
    options = {"kind": "jsd", "beta": beta, "floor": floor}
    ours = row_divergence(*sides, **options, column_pairs=pairs if "pairs" in layout else None, backend=backend)
    met = pairs[masks[0][pairs[:, 0]] & masks[1][pairs[:, 1]]]
    q, p = (
        (x.softmax(-1) * scale.exp()[..., None])[..., met[:, i]]
        for i, (x, scale) in enumerate(zip((student, teacher), scales, strict=True))
    )
    assert all((x < floor).any() and (x >= floor).any() for x in (q, p))
    expected = floored_jsd(q, p, beta, floor)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-13)
    weight, leaves = torch.rand_like(ours), (student, teacher, *scales)
    for a, b in zip(*(torch.autograd.grad(y, leaves, weight) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-13)


@by_backend
@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_rows_have_0_under_a_floor(dtype, kind, backend):
    """And gradient 0 where the kind's slope is 0 for equal probabilities."""
    x = (torch.randn(2, 3, 3000) * 3).to(dtype)
    x[0, 0, ::3] = float("-inf")
    pairs = torch.arange(3000)[:, None].expand(3000, 2)
    for column_pairs in (None, pairs):
        student, teacher = x.clone().requires_grad_(), x.clone().requires_grad_()
        scale = -torch.ones(2, 3) / 3
        sides = Logits(student, log_scale=scale), Logits(teacher, log_scale=scale)
        loss = row_divergence(*sides, kind=kind, floor=1e-4, column_pairs=column_pairs, backend=backend)
        loss.sum().backward()
        assert (loss == 0).all()
        if kind in ("jsd", "total_variation"):
            assert (student.grad == 0).all()
            assert (teacher.grad == 0).all()


@by_backend
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_floor_hides_no_nan_and_makes_what_one_side_lacks_finite(kind, backend):
    student, teacher = pair(1, 3, 9)
    student[0, 0, 4] = float("nan")
    student[0, 1, 4], teacher[0, 1, 5] = float("-inf"), float("-inf")
    for column_pairs in (None, torch.arange(9)[:, None].expand(9, 2)):
        loss = row_divergence(student, teacher, kind=kind, floor=0.9, column_pairs=column_pairs, backend=backend)[0]
        assert loss[0].isnan()
        assert loss[1:].isfinite().all()
    for bad in ([9, 0], [0, -1]):
        loss = row_divergence(teacher, teacher, kind=kind, floor=0.9, column_pairs=torch.tensor([bad]), backend=backend)
        assert loss.isnan().all()


@by_backend
@by_kind
def test_pairs_are_a_gather_of_columns(kind, backend):
    student, teacher = pair(2, 3, 20)[0].requires_grad_(), pair(2, 3, 33)[0].requires_grad_()
    pairs = torch.stack((torch.randperm(20)[:11], torch.randperm(33)[:11]), 1)
    ours = row_divergence(student, teacher, kind=kind, column_pairs=pairs, backend=backend)
    # Rows whose other columns are gone, as a log scale has it.
    q, p = student.log_softmax(-1)[..., pairs[:, 0]], teacher.log_softmax(-1)[..., pairs[:, 1]]
    twin = [Logits(x, log_scale=x.logsumexp(-1)) for x in (q, p)]
    expected = row_divergence(twin[0], twin[1], kind=kind, backend="reference")
    torch.testing.assert_close(ours, expected)
    weight = torch.rand_like(ours)
    for leaf in (student, teacher):
        torch.testing.assert_close(
            *(torch.autograd.grad(y, leaf, weight, retain_graph=True)[0] for y in (ours, expected))
        )


@by_backend
@pytest.mark.parametrize("kind", ["jsd", "adaptive_kl"])
def test_a_column_that_several_pairs_name_gets_the_sum_of_their_gradients(kind, backend):
    """In several tiles, of which one column has most pairs; and the order of pairs decides nothing but the rounding."""
    student, teacher = (x.float().requires_grad_() for x in pair(1, 1, 1100))
    pairs = torch.cat((torch.randint(1100, (300, 2)), torch.randint(1100, (12, 2)).mul(torch.tensor([1, 0]))))
    sides = Logits(student, standardize=True), Logits(teacher, temperature=1.5)
    values = [
        torch.autograd.grad(loss.sum(), (student, teacher))
        for loss in (
            row_divergence(*sides, kind=kind, column_pairs=p, backend=b)
            for p, b in ((pairs, backend), (pairs, backend), (pairs.flip(0), backend), (pairs, "reference"))
        )
    ]
    for ours, again, other, expected in zip(*values, strict=True):
        assert torch.equal(ours, again)
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-6)


@by_backend
@pytest.mark.parametrize("head", [0.0, 0.3, 0.6, 0.99])
def test_the_head_of_rows_with_many_equal_logits_is_the_definitions(head, backend):
    """16-bit logits of a few hundred values, so that equal ones cross the head's end, in several tiles."""
    student, teacher = pair(1, 2, 5000, dtype=torch.bfloat16)
    teacher[0, 1] = teacher[0, 1].round()
    ours = row_divergence(student, teacher, kind="adaptive_kl", head=head, backend=backend)
    expected = row_divergence(student.double(), teacher.double(), kind="adaptive_kl", head=head, backend="reference")
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)


@by_backend
@pytest.mark.parametrize("column_pairs", [None, torch.tensor([[0, 3], [4, 0], [4, 3]])], ids=["all", "pairs"])
def test_one_sides_gradient_is_what_it_is_beside_the_others(column_pairs, backend):
    """Also where a side is padded by more than the other one is wide."""
    student, teacher = torch.randn(1, 2, 5), torch.randn(1, 2, 3000)
    both = [x.requires_grad_() for x in (student, teacher)]

    def gradients(s, t, *leaves):
        t = Logits(t, standardize=True, vocab_size=5)
        loss = row_divergence(s, t, kind="jsd", column_pairs=column_pairs, backend=backend)
        return torch.autograd.grad(loss.sum(), leaves)

    of_student, of_teacher = gradients(student, teacher, *both)
    assert torch.equal(gradients(student, teacher.detach(), student)[0], of_student)
    assert torch.equal(gradients(student.detach(), teacher, teacher)[0], of_teacher)
    assert (of_teacher[..., 5:] == 0).all()
    assert (of_teacher[..., :5] != 0).any()


@by_backend
def test_a_pair_of_a_column_that_does_not_exist_shows(backend):
    student, teacher = pair(1, 2, 9)
    for bad in ([9, 0], [0, 9], [-1, 0], [0, -1]):
        pairs = torch.tensor([[1, 2], bad])
        assert row_divergence(student, teacher, column_pairs=pairs, backend=backend).isnan().all()


@by_backend
def test_no_pairs_at_all_come_to_0(backend):
    student, teacher = (x.requires_grad_() for x in pair(1, 2, 9))
    loss = row_divergence(student, teacher, column_pairs=torch.empty(0, 2, dtype=torch.int64), backend=backend)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (student.grad == 0).all()


@by_backend
def test_what_one_side_lacks_is_infinite_for_a_kl_alone(backend):
    student, teacher = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)
    student[..., 0] = teacher[..., 1] = float("-inf")
    values = {kind: row_divergence(student, teacher, kind=kind, backend=backend).item() for kind in KINDS}
    assert {kind for kind, value in values.items() if value == math.inf} == {"forward_kl", "reverse_kl", "adaptive_kl"}
    assert values["total_variation"] == pytest.approx(1 / 3)
    assert values["jsd"] == pytest.approx(math.log(2) / 3, rel=1e-6)


@by_backend
def test_a_row_without_a_partner_shows(backend):
    student, teacher = pair(1, 3, 7)
    rows = [Rows.from_mask(torch.tensor([mask])) for mask in ([True, True, False], [True, False, False])]
    loss = row_divergence(Logits(student, rows[0]), Logits(teacher, rows[1]), backend=backend)
    assert loss[0, 0].isfinite()
    assert loss[0, 1].isnan()
    assert loss[0, 2] == 0


@by_backend
@by_kind
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_sides_of_two_dtypes(dtypes, kind, backend):
    student, teacher = (x.to(dtype).requires_grad_() for x, dtype in zip(pair(1, 3, 70), dtypes, strict=True))
    loss = row_divergence(student, teacher, kind=kind, backend=backend)
    twins = [x.detach().double().requires_grad_() for x in (student, teacher)]
    expected = row_divergence(*twins, kind=kind, backend="reference")
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=2e-6)
    ours, theirs = (torch.autograd.grad(y.sum(), x) for y, x in ((loss, (student, teacher)), (expected, twins)))
    for a, b, dtype in zip(ours, theirs, dtypes, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=2 * torch.finfo(dtype).eps + 2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "kl"}, "kind must be one of 'forward_kl'.*got 'kl'"),
        ({"kind": "jsd", "beta": 1.5}, "beta must be at most 1, got 1.5"),
        ({"skew": 1.0}, "skew must be below 1, got 1"),
        ({"head": -0.1}, "head must be at least 0"),
        ({"interpolation": 0.0}, "interpolation must be above 0"),
        ({"interpolation": 0.5, "kind": "jsd"}, "interpolation below 1 needs kind='forward_kl', got 'jsd'"),
        ({"interpolation": 0.5, "column_pairs": torch.zeros(1, 2, dtype=torch.int64)}, "leave column_pairs out"),
        ({"floor": 1.0}, "floor must be below 1, got 1"),
        ({"floor": -1e-8}, "floor must be at least 0, got -1e-08"),
        ({"floor": 1e-8, "kind": "adaptive_kl"}, "another kind than 'adaptive_kl', got 1e-08; leave it out, or take"),
        ({"floor": 1e-8, "interpolation": 0.5}, "an interpolation of 1, got 1e-08 and 0.5; leave one of them out"),
        ({"column_pairs": torch.zeros(1, 3, dtype=torch.int64)}, r"column_pairs must be \[P, 2\].*got \(1, 3\)"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        row_divergence(torch.zeros(1, 2, 5), torch.zeros(1, 2, 5), **options)


def test_vocabularies_of_two_sizes_need_pairs():
    with pytest.raises(ValueError, match="vocabularies of one size, got 5 and 6; pass column_pairs"):
        row_divergence(torch.zeros(1, 2, 5), torch.zeros(1, 2, 6))


@by_backend
@pytest.mark.parametrize("kind", ["jsd", "adaptive_kl"])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.bfloat16, torch.float16)], ids=str)
def test_pairs_that_share_columns_are_ties_of_many(dtypes, kind, backend):
    """More pairs than columns: a column's gradient is the sum over all that name it."""
    student, teacher = (
        (torch.randn(1, 2, V) * 2).to(d).requires_grad_() for V, d in zip((30, 45), dtypes, strict=True)
    )
    pairs = torch.stack((torch.randint(30, (700,)), torch.randint(45, (700,))), 1)
    pairs[:300, 0] = 7
    outputs = []
    for z, name in (((student, teacher), backend), ((student.double(), teacher.double()), "reference")):
        loss = row_divergence(*z, kind=kind, column_pairs=pairs, backend=name)
        outputs.append([loss, *torch.autograd.grad(loss.sum(), (student, teacher))])
    eps = torch.finfo(dtypes[0]).eps
    for ours, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=2 * eps + 1e-5, atol=1e-9 + eps / 100)


@by_backend
def test_a_heads_end_among_equals_of_a_long_row(backend):
    """Two equal values where the head ends, one far from the other, and many that are too small to count."""
    teacher = torch.full((1, 1, 5000), -40.0)
    teacher[..., [3, 1700, 4100]] = torch.tensor([2.0, 1.0, 1.0])
    student = torch.randn(1, 1, 5000)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    of_head = (p - q).abs()[..., [3, 1700, 4100]].sum() / (p - q).abs().sum()
    expected = of_head * kl(p, q) + (1 - of_head) * kl(q, p)
    ours = row_divergence(student, teacher, kind="adaptive_kl", head=0.6, backend=backend)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)
