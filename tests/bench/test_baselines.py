"""Every baseline computes what the operator or loss that it is timed against computes.

That ``published_loss`` and ``published_uld_loss`` equal the losses' published modes stands in
``tests/losses/test_official_multi_level_ot.py`` and ``tests/losses/test_uld.py``.
"""

import sys

import pytest
import torch

from bench.baselines import ranks, rows, transport, trl_gkd, trl_uld
from bench.baselines.compiled import compiled
from bench.baselines.multi_level_ot import dense_paper_loss, tidied_paper_loss
from bench.baselines.ranking import published_ranking
from bench.baselines.uld import dense_uld_loss
from mlot_kernels import (
    Rows,
    multi_level_ot_loss,
    pairwise_cost,
    rank_truncate,
    ranking_loss,
    row_divergence,
    row_entropy,
    sinkhorn,
    soft_rank,
    sorted_l1,
    token_log_probability,
    topk_softmax,
    transport_cost,
    uld_loss,
)
from tests.losses.examples import labels_of, logits_of

K, EPSILON, ITERATIONS = 7, 0.1, 12
FLOATS = (torch.float64, torch.float32)
HALVES = (torch.bfloat16, torch.float16)
REFERENCE = {"backend": "reference"}


def assert_equal(baseline, ours, *inputs, **tolerances):
    """Equal outputs of one type and shape, and equal gradients of all floating-point inputs."""
    results = []
    for function in (baseline, ours):
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.rand(o.shape, generator=generator).to(o.dtype) for o in outputs]
        differentiable = [x for x in leaves if x.requires_grad]
        gradients = torch.autograd.grad(outputs, differentiable, upstream)
        results.append((*(o.detach() for o in outputs), *gradients))
    torch.testing.assert_close(*results, **tolerances)


def logits(B, T, V, dtype):
    """Rows without ties, which 16-bit random numbers would have."""
    if dtype in FLOATS:
        return logits_of(B, T, V, dtype)
    return (torch.rand(B, T, V).argsort(-1) / 16 - 4).to(dtype)


def ranked(x):
    result = rank_truncate(x, k=K, also_at=(2.0, 0.5), **REFERENCE)
    return result.log_probabilities, result.kept_mass


def top(x):
    result = topk_softmax(x, K, **REFERENCE)
    return result.log_probabilities, result.lse


ROW_BASELINES = {
    "row_entropy": (rows.row_entropy, lambda x: row_entropy(x, **REFERENCE)),
    "row_entropy_by_categorical": (rows.row_entropy_by_categorical, lambda x: row_entropy(x, **REFERENCE)),
    "topk_softmax": (lambda x: rows.topk_softmax(x, K), top),
    "topk_softmax_by_logsumexp": (lambda x: rows.topk_softmax_by_logsumexp(x, K), top),
    "rank_truncate": (lambda x: rows.rank_truncate(x, K, (1.0, 2.0, 0.5)), ranked),
}


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 61), (3, 1, 200)], ids=str)
@pytest.mark.parametrize("name", ROW_BASELINES)
def test_rows(name, shape, dtype):
    assert_equal(*ROW_BASELINES[name], logits(*shape, dtype))


def test_ranking_at_another_temperature_than_1():
    x = logits(2, 5, 61, torch.float64) / 0.7
    expected = rows.rank_truncate(x, K, (1.0, 2.0))
    torch.testing.assert_close(rows.rank_truncate(x * 0.7, K, (0.7, 1.4)), expected)


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 61), (3, 1, 200)], ids=str)
@pytest.mark.parametrize(
    "baseline", [rows.token_log_probability, rows.token_log_probability_by_cross_entropy], ids=lambda f: f.__name__
)
def test_token_log_probability(baseline, shape, dtype):
    tokens = torch.randint(shape[2], shape[:2])
    assert_equal(baseline, lambda x, t: token_log_probability(x, t, **REFERENCE), logits(*shape, dtype), tokens)


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
@pytest.mark.parametrize(("V_s", "V_t"), [(61, 90), (90, 61), (50, 50)])
def test_sorted_l1(V_s, V_t, dtype):
    sides = logits(2, 5, V_s, dtype), logits(2, 5, V_t, dtype)
    assert_equal(rows.sorted_l1, lambda s, t: sorted_l1(s, t, **REFERENCE), *sides)


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
def test_soft_rank(dtype):
    values, lengths = torch.randn(6, 17).mul(2).to(dtype), torch.tensor([17, 16, 9, 2, 1, 0])
    assert_equal(ranks.soft_rank_by_rows, lambda x, counts: soft_rank(x, counts, **REFERENCE), values, lengths)


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
def test_jsd(dtype):
    assert_equal(
        rows.jsd, lambda s, t: row_divergence(s, t, kind="jsd", **REFERENCE), *(logits(2, 5, 61, dtype) for _ in "st")
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_trls_jsd(beta):
    pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed")
    assert_equal(
        lambda s, t: trl_gkd.trl_jsd(s, t, beta),
        lambda s, t: row_divergence(s, t, kind="jsd", beta=beta, **REFERENCE),
        *(logits(2, 5, 61, torch.float32) for _ in "st"),
    )


def features(B, n, D, dtype):
    return logits_of(B, n, D, torch.float64).softmax(-1).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
@pytest.mark.parametrize(("M", "N"), [(5, 9), (8, 3)])
@pytest.mark.parametrize(
    "baseline", [transport.pairwise_l1, transport.pairwise_l1_by_broadcasting], ids=lambda f: f.__name__
)
def test_pairwise_l1(baseline, M, N, dtype):
    sides = features(2, M, 11, dtype), features(2, N, 11, dtype)
    assert_equal(baseline, lambda x, y: pairwise_cost(x, y, metric="l1", **REFERENCE), *sides)


SINKHORNS = (
    transport.sinkhorn,
    transport.sinkhorn_by_matmul,
    transport.sinkhorn_by_normalisation,
    transport.sinkhorn_in_log_domain,
)


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
@pytest.mark.parametrize(("M", "N"), [(5, 9), (8, 3)])
@pytest.mark.parametrize("baseline", SINKHORNS, ids=lambda f: f.__name__)
def test_sinkhorn(baseline, M, N, dtype):
    assert_equal(
        lambda cost: baseline(cost, EPSILON, ITERATIONS),
        lambda cost: sinkhorn(cost, epsilon=EPSILON, iterations=ITERATIONS, marginals="unit", **REFERENCE).cost,
        torch.rand(2, M, N).to(dtype),
    )


@pytest.mark.parametrize("baseline", SINKHORNS, ids=lambda f: f.__name__)
def test_sinkhorn_does_not_drift_where_sides_differ(baseline):
    cost = torch.rand(1, 64, 16)
    expected = sinkhorn(cost, epsilon=EPSILON, iterations=100, marginals="unit", **REFERENCE).cost
    torch.testing.assert_close(baseline(cost, EPSILON, 100)[0], expected)


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
@pytest.mark.parametrize(("M", "N"), [(5, 9), (8, 3)])
@pytest.mark.parametrize("method", ["log_sinkhorn", "sinkhorn"])
def test_pot(method, M, N, dtype):
    pytest.importorskip("ot", reason="POT is not installed")
    cost = torch.rand(2, M, N).to(dtype)
    options = {"epsilon": EPSILON, "iterations": ITERATIONS, **REFERENCE}
    assert_equal(
        lambda cost: transport.pot_sinkhorn(cost, EPSILON, ITERATIONS, method=method),
        lambda cost: sinkhorn(cost, marginals="uniform", **options).cost,
        cost,
    )
    assert_equal(
        lambda cost: transport.pot_regularized(cost, EPSILON, ITERATIONS, method=method),
        lambda cost: sinkhorn(cost, marginals="uniform", gradient="envelope", **options).regularized_cost,
        cost,
    )


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
@pytest.mark.parametrize(("M", "N"), [(5, 9), (8, 3)])
def test_geomloss_comes_near_the_converged_problem(M, N, dtype):
    pytest.importorskip("geomloss", reason="GeomLoss is not installed")
    # Its annealing leaves an error in the plan, hence in the gradient, that falls with 1 - scaling.
    assert_equal(
        lambda x, y: transport.geomloss_regularized(x, y, 0.5, scaling=0.995),
        lambda x, y: (
            transport_cost(
                x, y, epsilon=0.5, iterations=500, marginals="uniform", gradient="envelope", **REFERENCE
            ).regularized_cost
        ),
        features(2, M, 11, dtype),
        features(2, N, 11, dtype),
        rtol=0.02,
        atol=1e-3,
    )


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 6, 80), (2, 9, 65)), ((3, 9, 60), (3, 6, 90)), ((2, 5, 30), (2, 5, 70))], ids=str
)
def test_dense_paper_loss(student, teacher, dtype):
    sides = logits(*student, dtype), logits(*teacher, dtype)
    assert_equal(dense_paper_loss, lambda s, t: multi_level_ot_loss(s, t, **REFERENCE), *sides)
    options = {"k": 9, "transport_temperature": 3.0, "epsilon": 0.2, "iterations": 5}
    assert_equal(
        lambda s, t: dense_paper_loss(s, t, weights=(0.5, 2.0, 3.0), **options),
        lambda s, t: multi_level_ot_loss(
            s, t, absolute_weight=0.5, logarithmic_weight=2.0, transport_weight=3.0, **options, **REFERENCE
        ),
        *sides,
    )


def test_dense_paper_loss_equals_the_tidied_one():
    student, teacher = logits_of(2, 6, 80), logits_of(2, 9, 65)
    everything = Rows.every(2, 6), Rows.every(2, 9)
    tidied = tidied_paper_loss(student, teacher, *everything)
    torch.testing.assert_close(dense_paper_loss(student, teacher), tidied)


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
@pytest.mark.parametrize(("student", "teacher"), [((2, 6, 80), (2, 9, 65)), ((3, 9, 60), (3, 6, 90))], ids=str)
def test_dense_uld_loss(student, teacher, dtype):
    sides = logits(*student, dtype), logits(*teacher, dtype)
    assert_equal(dense_uld_loss, lambda s, t: uld_loss(s, t, **REFERENCE), *sides)


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("V_s", "V_t"), [(61, 90), (90, 61)])
def test_trl(V_s, V_t, shift, dtype):
    pytest.importorskip("trl.experimental.gold", reason="TRL is not installed")
    labels = labels_of(12, (2, 5), (1, 7), (8, 3)), labels_of(15, (1, 6), (4, 4), (9, 5))
    assert_equal(
        lambda s, t: trl_uld.trl_uld_loss(s, t, *labels, shift=shift),
        lambda s, t: uld_loss(s, t, *labels, shift=shift, **REFERENCE),
        logits(3, 12, V_s, dtype),
        logits(3, 15, V_t, dtype),
    )


def test_trl_where_all_rows_count():
    pytest.importorskip("trl.experimental.gold", reason="TRL is not installed")
    everything = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    assert_equal(
        lambda s, t: trl_uld.trl_uld_loss(s, t, *everything, shift=0),
        lambda s, t: uld_loss(s, t, **REFERENCE),
        logits_of(2, 6, 61),
        logits_of(2, 9, 90),
    )


def test_trl_counts_a_sequence_without_an_answer_in_its_mean():
    pytest.importorskip("trl.experimental.gold", reason="TRL is not installed")
    student, teacher = logits_of(3, 12, 61), logits_of(3, 12, 90)
    labels = labels_of(12, (2, 5), (0, 0), (8, 3))
    value = trl_uld.trl_uld_loss(student, teacher, labels, labels)
    torch.testing.assert_close(value * 3 / 2, uld_loss(student, teacher, labels, labels, **REFERENCE))


def test_a_baseline_that_is_not_installed_says_what_to_install(monkeypatch):
    x = torch.rand(1, 3, 3)
    monkeypatch.setitem(sys.modules, "geomloss", None)
    with pytest.raises(ImportError, match=r"needs GeomLoss: pip install 'mlot-kernels\[bench\]'"):
        transport.geomloss_regularized(x, x, EPSILON)
    monkeypatch.setitem(sys.modules, "ot.batch", None)
    with pytest.raises(ImportError, match=r"needs POT: pip install 'mlot-kernels\[bench\]'"):
        transport.pot_sinkhorn(x, EPSILON, ITERATIONS)
    monkeypatch.setitem(sys.modules, "trl.experimental.gold.gold_trainer", None)
    trl_uld._uld_loss.cache_clear()
    labels = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ImportError, match=r"needs TRL 1\.16"):
        trl_uld.trl_uld_loss(x, x, labels, labels)
    with pytest.raises(ValueError, match="shift must be 0 or 1, got 2"):
        trl_uld.trl_uld_loss(x, x, labels, labels, shift=2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [2, 5, 20])
def test_published_ranking(k, dtype):
    assert_equal(
        lambda s, t: published_ranking(s, t, k),
        lambda s, t: ranking_loss(s, t, k=k, dedup="official", reduction="none", **REFERENCE),
        *(logits(2, 5, 61, dtype) for _ in "st"),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.fixture
def compiler_options():
    """What ``compiled`` sets for the process is put back."""
    with torch._dynamo.config.patch(recompile_limit=1), torch._functorch.config.patch(donated_buffer=True):
        before = torch._dynamo.config.fail_on_recompile_limit_hit
        yield
        torch._dynamo.config.fail_on_recompile_limit_hit = before
    torch._dynamo.reset()


ONE_GRAPH = {
    "row_entropy": (rows.row_entropy, 1),
    "topk_softmax": (lambda x: rows.topk_softmax(x, K), 1),
    "rank_truncate": (lambda x: rows.rank_truncate(x, K, (1.0, 2.0)), 1),
    "sorted_l1": (rows.sorted_l1, 2),
    "dense_paper_loss": (lambda s, t: dense_paper_loss(s, t, iterations=3), 2),
    "dense_uld_loss": (dense_uld_loss, 2),
}


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_is_one_graph(name):
    function, sides = ONE_GRAPH[name]
    traced = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    assert_equal(traced, function, *(logits_of(2, 5, V) for V in (61, 90)[:sides]))


def test_compiled(compiler_options):
    x = logits(2, 5, 61, torch.bfloat16).requires_grad_()
    function = compiled(rows.row_entropy)
    assert not torch._functorch.config.donated_buffer  # not every backward that takes a donated tensor fails on its own
    torch.testing.assert_close(function(x), rows.row_entropy(x))
    (output,) = function(x)
    first, second = (torch.autograd.grad(output.sum(), x, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, torch.autograd.grad(rows.row_entropy(x)[0].sum(), x))
    torch.testing.assert_close(function(x[:, :4]), rows.row_entropy(x[:, :4]))
    assert compiled(rows.row_entropy) is function  # which keeps the graphs that it has
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit),
    ):
        function(x[:, :3])
