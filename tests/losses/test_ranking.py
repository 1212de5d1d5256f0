import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mlot_kernels import RankingLoss, TeacherHidden, TeacherTopK, divergence_loss, ranking_loss
from mlot_kernels.ops.row_divergence.reference import KINDS
from tests.dispatch_modes import Allocations, NoHostSync
from tests.losses.examples import labels_of, logits_of, value_and_gradient

B, T, V = 2, 9, 40
LABELS = labels_of(T, (2, 4, 7, 1), (1, 7)), labels_of(T, (1, 5, 7, 2), (3, 4))


def soft_rank_by_pooling(x: Tensor, epsilon: float) -> Tensor:
    """Soft ranks of one row by pooling adjacent violators, in plain float64 and differentiable: rank 1 is the least."""
    n = len(x)
    order = x.argsort(descending=True)
    s = x[order] / epsilon
    w = torch.arange(n, 0, -1, dtype=x.dtype)
    blocks = []
    for i in range(n):
        blocks.append([i])
        while len(blocks) > 1 and (s - w)[blocks[-2]].mean() <= (s - w)[blocks[-1]].mean():
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    v = torch.cat([(s - w)[block].mean().expand(len(block)) for block in blocks])
    return (s - v)[order.argsort()]


def by_hand(
    student: Tensor, teacher: Tensor, k: int, *, epsilon: float = 1.0, space: str = "logits", dedup: str = "exact"
):
    """Of two rows: 1 - Pearson's correlation of soft ranks over the union of the top-k."""
    own, other = teacher.topk(k).indices.tolist(), student.topk(k).indices.tolist()
    union = sorted({*own, *other}) if dedup == "exact" else own + other
    if space == "probabilities":
        student, teacher = student.softmax(-1), teacher.softmax(-1)
    if len(union) == 1:
        return student.sum() * 0
    ranks = [soft_rank_by_pooling(x[union], epsilon) for x in (student, teacher)]
    return 1 - torch.corrcoef(torch.stack(ranks))[0, 1]


@pytest.mark.parametrize("dedup", ["exact", "official"])
@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize(("k", "epsilon"), [(1, 1.0), (2, 1.0), (5, 1.0), (5, 4.0), (10, 0.3)])
def test_rows_are_1_less_the_correlation_of_soft_ranks(k, epsilon, space, dedup):
    if k == 1 and dedup == "official":
        pytest.skip("two entries that tie have no correlation: test_a_side_whose_ranks_are_the_same_has_loss_1")
    student = logits_of(1, T, V, torch.float64)
    teacher = student + logits_of(1, T, V, torch.float64) / 3
    options = {"k": k, "epsilon": epsilon, "space": space, "dedup": dedup}
    expected = value_and_gradient(
        lambda s: torch.stack([by_hand(s[0, t], teacher[0, t], **options) for t in range(T)]), student
    )
    ours = value_and_gradient(ranking_loss, student, teacher, reduction="none", **options)
    for a, b in zip(ours, (expected[0][None], expected[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_probabilities_are_less_than_epsilon_apart_which_is_pearsons_correlation():
    student, teacher = logits_of(1, T, V, torch.float64), logits_of(1, T, V, torch.float64)
    ours = ranking_loss(student, teacher, k=6, space="probabilities", reduction="none")[0]
    for t in range(T):
        union = sorted({*student[0, t].topk(6).indices.tolist(), *teacher[0, t].topk(6).indices.tolist()})
        p, q = teacher[0, t].softmax(-1)[union], student[0, t].softmax(-1)[union]
        torch.testing.assert_close(ours[t], 1 - torch.corrcoef(torch.stack((p, q)))[0, 1])


def test_well_separated_logits_give_spearmans_correlation():
    stats = pytest.importorskip("scipy.stats", reason="Spearman's correlation is SciPy's")
    student, teacher = (5.0 * torch.stack([torch.randperm(V) for _ in range(T)])[None] for _ in range(2))
    value, gradient = value_and_gradient(ranking_loss, student, teacher, k=V, reduction="none")
    for t in range(T):
        expected = 1 - stats.spearmanr(student[0, t], teacher[0, t]).statistic
        torch.testing.assert_close(value[0, t], torch.tensor(expected).float())
    assert (gradient == 0).all()


# The defects of the published code: research on it counts seven, of which these touch the ranking term.


def test_a_row_does_not_depend_on_how_many_there_are():
    student, teacher = logits_of(1, T, V), logits_of(1, T, V) / 2
    each, gradient = value_and_gradient(ranking_loss, student, teacher, k=5, reduction="none")
    for t in range(T):
        value, alone = value_and_gradient(ranking_loss, student[:, t : t + 1], teacher[:, t : t + 1], k=5)
        assert torch.equal(value, each[0, t])
        assert torch.equal(alone[0, 0], gradient[0, t])


def test_a_token_that_both_rank_counts_once_and_officially_twice():
    student = logits_of(1, T, V, torch.float64)
    exact = ranking_loss(student, student * 0.7 + 1, k=4)
    official = ranking_loss(student, student * 0.7 + 1, k=4, dedup="official")
    assert exact != official  # the same columns twice: ties, which bend the ranks


def test_a_side_whose_ranks_are_the_same_has_loss_1_and_spoils_nobody():
    student, teacher = logits_of(1, T, V), logits_of(1, T, V)
    student[0, 3] = 2.0
    value, gradient = value_and_gradient(ranking_loss, student, teacher, k=5, reduction="none")
    assert value[0, 3] == 1
    assert (gradient[0, 3] == 0).all()
    assert value.isfinite().all()
    teacher[0, 5] = -1.0
    assert ranking_loss(student, teacher, k=5, reduction="none")[0, 5] == 1


def test_a_union_of_one_column_is_0():
    student = logits_of(1, T, V)
    value, gradient = value_and_gradient(ranking_loss, student, 2 * student, k=1)
    assert value == 0
    assert (gradient == 0).all()
    assert ranking_loss(student, 2 * student, k=1, dedup="official") == 1  # one column twice: two that tie
    assert value_and_gradient(ranking_loss, student[..., :1], student[..., :1], k=3)[0] == 0


@pytest.mark.parametrize("base", KINDS)
def test_the_paper_and_the_published_code_add_their_base(base):
    student, teacher = logits_of(B, T, V), logits_of(B, T, V)
    divergence = divergence_loss(student, teacher, *LABELS, kind=base)
    for loss, expected in (
        (RankingLoss.paper(base), 2 * ranking_loss(student, teacher, *LABELS, k=5) + divergence),
        (
            RankingLoss.official(base),
            ranking_loss(student, teacher, *LABELS, k=5, dedup="official") + divergence / 2,
        ),
    ):
        torch.testing.assert_close(loss(student, teacher, *LABELS), expected)


def operators_called(loss, *inputs) -> list[str]:
    """The operators of this package that forward and backward run, and the bytes of logits that each takes."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "mlot":
                large = sum(x.nbytes for x in args if isinstance(x, Tensor) and x.shape[-1:] == (V,))
                called.append(f"{func.name()} {large}")
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    with Calls():
        loss(*inputs).backward()
    return sorted(called)


def test_a_base_adds_no_read_of_the_logits_but_its_own():
    student, teacher = logits_of(B, T, V).requires_grad_(), logits_of(B, T, V)
    alone = operators_called(RankingLoss(k=5), student, teacher)
    assert any("topk_softmax" in call for call in alone)
    assert not any("backward" in call and "topk_softmax" in call for call in alone)  # ranks leave the normaliser alone
    base = operators_called(lambda s, t: divergence_loss(s, t, kind="jsd"), student, teacher)
    assert operators_called(RankingLoss.paper("jsd"), student, teacher) == sorted(alone + base)


def test_the_dynamic_weight_is_the_part_of_the_columns_that_both_rank():
    student = logits_of(B, T, V)
    teacher = student + logits_of(B, T, V) / 3
    overlap = torch.tensor(
        [
            [
                len({*student[b, t].topk(5).indices.tolist()} & {*teacher[b, t].topk(5).indices.tolist()}) / 5
                for t in range(T)
            ]
            for b in range(B)
        ]
    )
    each = divergence_loss(student, teacher, reduction="none")
    expected = 2 * ranking_loss(student, teacher, k=5) + (overlap * each).mean()
    value, parts = RankingLoss.paper(dynamic=True)(student, teacher, return_components=True)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(parts["overlap_rate"], overlap.mean())
    torch.testing.assert_close(parts["base"], each.mean())


def test_components_and_weights():
    student, teacher = logits_of(B, T, V), logits_of(B, T, V)
    teacher[0, 2] = student[0, 2]  # one row whose top-k is the same
    weight = torch.rand(B, T)
    value, parts = ranking_loss(student, teacher, k=3, token_weight=weight, return_components=True)
    assert parts.keys() == {"ranking", "base", "consistency_rate", "overlap_rate", "rows"}
    each = ranking_loss(student, teacher, k=3, reduction="none")
    torch.testing.assert_close(value, (each * weight).sum() / weight.sum())
    torch.testing.assert_close(parts["ranking"], value)
    torch.testing.assert_close(parts["consistency_rate"], weight[0, 2] / weight.sum())
    assert parts["base"] == 0
    assert parts["rows"] == B * T
    accumulated = ranking_loss(student, teacher, k=3, num_items_in_batch=torch.tensor(36))
    torch.testing.assert_close(accumulated, each.sum() / 36)


@pytest.mark.parametrize(
    "options", [{}, {"base": "jsd"}, {"space": "probabilities"}], ids=["alone", "base", "probabilities"]
)
def test_rows_that_do_not_count_are_not_read_and_a_nan_that_counts_shows(options):
    student, teacher = logits_of(B, T, V), logits_of(B, T, V)
    counted = torch.zeros(B, T, dtype=torch.bool)
    counted[0, 2:5] = counted[1, 4:8] = True
    call = {"k": 4, "reduction": "none", **options}
    expected = value_and_gradient(ranking_loss, student, teacher, counted, counted, **call)
    spoilt = [x.masked_fill(~counted[..., None], float("nan")) for x in (student, teacher)]
    for a, b in zip(value_and_gradient(ranking_loss, *spoilt, counted, counted, **call), expected, strict=True):
        assert torch.equal(a, b)
    for side in range(2):
        spoilt = [student.clone(), teacher.clone()]
        spoilt[side][0, 3, 0] = float("nan")
        value, gradient = value_and_gradient(ranking_loss, *spoilt, counted, counted, **call)
        assert value.isnan().nonzero().tolist() == [[0, 1]]
        assert gradient[0, 3].isnan().any()
        assert not gradient[1].isnan().any()


def test_gradcheck_on_both_sides():
    student, teacher = (logits_of(B, 4, 12, torch.float64).requires_grad_() for _ in range(2))
    for options in ({}, {"dedup": "official"}, {"base": "jsd", "dynamic": True}, {"space": "probabilities"}):
        assert torch.autograd.gradcheck(
            lambda s, t, options=options: ranking_loss(s, t, k=4, epsilon=2.0, **options),
            (student, teacher),
            fast_mode=True,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype):
    student, teacher = logits_of(B, T, V, dtype), logits_of(B, T, V, dtype)
    value, gradient = value_and_gradient(ranking_loss, student, teacher, *LABELS, k=5)
    wide, expected = value_and_gradient(ranking_loss, student.float(), teacher.float(), *LABELS, k=5)
    assert torch.equal(value, wide)
    assert torch.equal(gradient, expected.to(dtype))


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_teachers_without_logits(space):
    student = logits_of(B, T, V)
    hidden, weight = torch.randn(B, T, 7), torch.randn(V, 7)
    forms = [(TeacherHidden(hidden, weight, block_rows=5), hidden @ weight.T)]
    log_p = logits_of(B, T, V).log_softmax(-1)
    values, columns = log_p.topk(8)
    rest = (1 - values.exp().sum(-1, keepdim=True)) / (V - 8)
    forms.append((TeacherTopK(values, columns), torch.full_like(log_p, float("-inf")).scatter(-1, columns, values)))
    dense = rest.log().repeat(1, 1, V).scatter(-1, columns, values)
    forms.append((TeacherTopK(values, columns, "uniform"), dense))
    for teacher, logits in forms:
        for options in ({}, {"base": "jsd", "dynamic": True}):
            ours = value_and_gradient(ranking_loss, student, teacher, *LABELS, k=5, space=space, **options)
            expected = value_and_gradient(ranking_loss, student, logits, *LABELS, k=5, space=space, **options)
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (lambda log_p, c: TeacherTopK(log_p), {}, "RankingLoss compares columns"),
        (lambda log_p, c: TeacherTopK(log_p, c, "bucket"), {}, "RankingLoss reads the teacher's probability of single"),
        (lambda log_p, c: TeacherTopK(log_p, c), {"k": 9}, "the K of TeacherTopK"),
        (lambda log_p, c: TeacherTopK(log_p, c), {"base": "reverse_kl"}, "infinite where"),
        (lambda log_p, c: TeacherTopK(log_p, c), {"teacher_vocab_size": V + 1}, "vocabularies of one size"),
        (lambda log_p, c: logits_of(B, T, V + 1), {}, "vocabularies of one size"),
    ],
)
def test_what_is_refused(teacher, options, message):
    log_p, columns = logits_of(B, T, V).log_softmax(-1).topk(8)
    with pytest.raises(ValueError, match=message):
        ranking_loss(logits_of(B, T, V), teacher(log_p, columns), *LABELS, **{"k": 5, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"space": "ranks"}, "space must be one of"),
        ({"dedup": "none"}, "dedup must be one of"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"base": "kl"}, "base must be one of"),
        ({"dynamic": True}, "base is None"),
    ],
)
def test_bad_options_are_refused_when_the_module_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        RankingLoss(**options)


def test_composes_with_compile_func_and_checkpoint():
    student, teacher = logits_of(B, T, V), logits_of(B, T, V)
    loss = RankingLoss.paper()
    value, gradient = value_and_gradient(loss, student, teacher, *LABELS)
    compiled = torch.compile(lambda s: loss(s, teacher, *LABELS), fullgraph=True, backend="aot_eager")
    ways = {
        "compile": value_and_gradient(compiled, student),
        "checkpoint": value_and_gradient(
            lambda s: torch.utils.checkpoint.checkpoint(loss, s, teacher, *LABELS, use_reentrant=False), student
        ),
        "func": torch.func.grad_and_value(lambda s: loss(s, teacher, *LABELS))(student)[::-1],
    }
    for way, (again, other) in ways.items():
        torch.testing.assert_close(again, value, msg=way)
        torch.testing.assert_close(other, gradient, msg=way)
    with NoHostSync():
        loss(student.requires_grad_(), teacher, *LABELS).backward()


@pytest.mark.parametrize("base", [None, "forward_kl"])
def test_gradients_meet_in_one_tensor(base):
    student, teacher = logits_of(2, 40, 3000).requires_grad_(), logits_of(2, 40, 3000)
    value = ranking_loss(student, teacher, base=base)
    with Allocations() as mode:
        value.backward()
    gradient = student.numel() * 4
    assert gradient <= mode.peak < 1.2 * gradient
