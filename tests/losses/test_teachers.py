"""Every loss against teachers that are not dense logits: what README.md's table says of each cell."""

import pytest
import torch
from torch import Tensor

from mlot_kernels import TeacherHidden, TeacherTopK, divergence_loss, multi_level_ot_loss, uld_loss
from mlot_kernels.ops.row_divergence.reference import KINDS
from tests.dispatch_modes import Allocations, NoHostSync
from tests.losses.examples import labels_of, logits_of, value_and_gradient
from tests.losses.teachers import FORMS, INFINITE, LABELS, LOSSES, B, K, T, V, hidden_of, top_k_of


def assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "options", [{}, {"logit_scale": 0.5, "softcap": 2.0, "block_rows": 5}], ids=["plain", "capped"]
)
def test_hidden_states_are_the_logits_that_they_make(name, options):
    loss, arguments = LOSSES[name]
    student = logits_of(B, T, V)
    teacher, logits = hidden_of(**options)
    temperatures = {} if loss is multi_level_ot_loss else {"student_temperature": 1.5, "teacher_temperature": 2.0}
    for more in ({}, temperatures):
        assert_same(
            value_and_gradient(loss, student, teacher, *LABELS, **arguments, **more),
            value_and_gradient(loss, student, logits, *LABELS, **arguments, **more),
        )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tail", ["renormalize", "uniform"])
def test_a_top_k_is_the_rows_that_its_tail_makes_of_it(name, tail):
    if tail == "renormalize" and name in INFINITE:
        pytest.skip("refused: infinite; test_teachers_refused.py has it")
    loss, options = LOSSES[name]
    student = logits_of(B, T, V)
    teacher, dense = top_k_of(tail)
    size = {} if loss is divergence_loss else {"teacher_vocab_size": V}
    temperatures = {} if loss is multi_level_ot_loss else {"student_temperature": 1.5, "teacher_temperature": 2.0}
    for more in ({}, temperatures):
        assert_same(
            value_and_gradient(loss, student, teacher, *LABELS, **options, **size, **more),
            value_and_gradient(loss, student, dense, *LABELS, **options, **more),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_under_bucket_a_divergence_is_that_of_the_known_columns_and_the_rest(kind):
    student = logits_of(B, T, V)
    teacher, _ = top_k_of("bucket")

    def by_hand(logits: Tensor) -> Tensor:
        q = logits.double().softmax(-1)
        p = teacher.log_probabilities.double().exp()
        q = q.gather(2, teacher.columns.clamp(min=0)) * (p > 0)
        outcomes = [torch.cat((x, 1 - x.sum(-1, keepdim=True)), -1).clamp(min=1e-300).log() for x in (q, p)]
        return divergence_loss(*outcomes, kind=kind).float()

    ours = value_and_gradient(divergence_loss, student, teacher, kind=kind)
    assert_same(ours, value_and_gradient(by_hand, student))


def test_under_bucket_uld_compares_the_largest_and_the_two_rests():
    student = logits_of(B, T, 31)
    teacher, _ = top_k_of("bucket", logits_of(B, T, V))
    rows = torch.ones(B, T, dtype=torch.bool)

    def by_hand(logits: Tensor) -> Tensor:
        s, t = (
            logits.softmax(-1).sort(descending=True).values,
            teacher.log_probabilities.exp().sort(descending=True).values,
        )
        rest = s[..., K:].sum(-1) - (1 - t.sum(-1))
        return ((s[..., :K] - t).abs().sum(-1) + rest.abs()).mean()

    for columns in (teacher.columns, None):
        given = TeacherTopK(teacher.log_probabilities, columns, "bucket")
        ours = value_and_gradient(uld_loss, student, given, rows, rows, teacher_vocab_size=V)
        assert_same(ours, value_and_gradient(by_hand, student))


@pytest.mark.parametrize("tail", ["renormalize", "uniform", "bucket"])
@pytest.mark.parametrize("name", ["uld", "jsd", "forward_kl", "multi_level_ot"])
def test_a_top_k_of_all_columns_is_the_whole_teacher(name, tail):
    if (name, tail) == ("multi_level_ot", "bucket"):
        pytest.skip("refused; test_teachers_refused.py has it")
    loss, options = LOSSES[name]
    student, logits = logits_of(B, T, V), logits_of(B, T, V)
    teacher, _ = top_k_of(tail, logits, k=V)
    size = {} if loss is divergence_loss else {"teacher_vocab_size": V}
    assert_same(
        value_and_gradient(loss, student, teacher, *LABELS, **options, **size),
        value_and_gradient(loss, student, logits, *LABELS, **options),
    )


@pytest.mark.parametrize("tail", ["renormalize", "uniform", "bucket"])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_tail_bound_bounds(tail, k):
    student, logits = logits_of(B, T, 31), logits_of(B, T, V) / 2
    whole = uld_loss(student, logits, *LABELS)
    teacher, _ = top_k_of(tail, logits, k=k)
    value, parts = uld_loss(student, teacher, *LABELS, teacher_vocab_size=V, return_components=True)
    assert 0 < (value - whole).abs() <= parts["tail_bound"] + 1e-6
    assert parts["tail_bound"] <= 2
    if tail != "bucket":  # warmer, more lies in the tail than the top-k can tell
        warm = {"teacher_temperature": 3.0}
        value, parts = uld_loss(student, teacher, *LABELS, teacher_vocab_size=V, return_components=True, **warm)
        assert (value - uld_loss(student, logits, *LABELS, **warm)).abs() <= parts["tail_bound"] == 2
    assert uld_loss(student, logits, *LABELS, return_components=True)[1]["tail_bound"] == 0


def test_taid_mixes_with_a_top_k_and_with_hidden_states():
    student = logits_of(B, T, V)
    for teacher, dense in (top_k_of("renormalize"), top_k_of("uniform"), hidden_of()):
        assert_same(
            value_and_gradient(divergence_loss, student, teacher, *LABELS, interpolation=0.4),
            value_and_gradient(divergence_loss, student, dense, *LABELS, interpolation=0.4),
        )


@pytest.mark.parametrize("scope", ["sequence", "batch", "token"])
@pytest.mark.parametrize("tail", ["renormalize", "uniform"])
def test_multi_level_ot_ranks_a_top_k_in_every_scope(scope, tail):
    student = logits_of(B, T, V)
    teacher, dense = top_k_of(tail, logits_of(B, T, V))
    options = {"k": K, "scope": scope}
    ours = value_and_gradient(multi_level_ot_loss, student, teacher, *LABELS, teacher_vocab_size=V, **options)
    assert_same(ours, value_and_gradient(multi_level_ot_loss, student, dense, *LABELS, **options))


def test_multi_level_ot_takes_hidden_states_token_by_token_and_matched():
    student = logits_of(B, T, 31)
    teacher, logits = hidden_of()
    for options in ({"scope": "token"}, {"matching": "greedy"}):
        assert_same(
            value_and_gradient(multi_level_ot_loss, student, teacher, *LABELS, k=4, **options),
            value_and_gradient(multi_level_ot_loss, student, logits, *LABELS, k=4, **options),
        )


def spoilt(teacher: TeacherHidden | TeacherTopK, at: Tensor) -> TeacherHidden | TeacherTopK:
    """The same with NaN at the positions ``at`` ``[B, T]``."""
    if isinstance(teacher, TeacherHidden):
        return TeacherHidden(teacher.hidden.masked_fill(at[..., None], float("nan")), teacher.weight, teacher.bias)
    values = teacher.log_probabilities.masked_fill(at[..., None], float("nan"))
    return TeacherTopK(values, teacher.columns, teacher.tail)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["uld", "jsd", "multi_level_ot"])
def test_rows_that_do_not_count_are_not_read_and_nan_in_one_that_does_shows(form, name):
    if (name, form) == ("multi_level_ot", "bucket"):
        pytest.skip("refused; test_teachers_refused.py has it")
    loss, options = LOSSES[name]
    size = {} if loss is divergence_loss or form == "hidden" else {"teacher_vocab_size": V}
    student, teacher = logits_of(B, T, V), FORMS[form]()
    counted = torch.zeros(B, T, dtype=torch.bool)
    counted[0, 2:5] = counted[1, 4:9] = True

    def run(given: TeacherHidden | TeacherTopK) -> tuple[Tensor, Tensor]:
        return value_and_gradient(loss, student, given, counted, counted, **options, **size, reduction="none")

    expected = run(teacher)
    for a, b in zip(run(spoilt(teacher, ~counted)), expected, strict=True):
        assert torch.equal(a, b)
    assert (expected[1][~counted] == 0).all()
    one = torch.zeros_like(counted)
    one[0, 3] = True
    value, gradient = run(spoilt(teacher, one))
    assert value[0].isnan().any()
    assert not value[1].isnan().any()
    assert gradient[0, 3].isnan().any()
    nothing = torch.zeros_like(counted)
    value, gradient = value_and_gradient(loss, student, teacher, nothing, nothing, **options, **size)
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("tail", ["renormalize", "uniform", "bucket"])
def test_a_column_that_does_not_exist_shows(tail):
    teacher, _ = top_k_of(tail, logits_of(B, T, V))
    columns = teacher.columns.clone()
    columns[0, 3, 1] = V
    broken = TeacherTopK(teacher.log_probabilities, columns, tail)
    rows = torch.ones(B, T, dtype=torch.bool)
    loss = divergence_loss(logits_of(B, T, V), broken, rows, rows, reduction="none")
    assert loss.isnan().nonzero().tolist() == [[0, 3]]
    if tail != "bucket":
        loss = multi_level_ot_loss(logits_of(B, T, V), broken, rows, rows, reduction="none", teacher_vocab_size=V)
        assert loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["uld", "jsd", "multi_level_ot"])
def test_gradcheck(form, name):
    if (name, form) == ("multi_level_ot", "bucket"):
        pytest.skip("refused; test_teachers_refused.py has it")
    loss, options = LOSSES[name]
    size = {} if loss is divergence_loss or form == "hidden" else {"teacher_vocab_size": V}
    teacher = FORMS[form]()
    student = logits_of(B, T, V, torch.float64).requires_grad_()
    labels = labels_of(T, (3, 2), (5, 1)), labels_of(T, (1, 2), (4, 2))
    assert torch.autograd.gradcheck(
        lambda z: loss(z, teacher, *labels, **options, **size), student, eps=1e-6, atol=1e-6, fast_mode=True
    )


@pytest.mark.parametrize("loss", [uld_loss, divergence_loss])
def test_hidden_states_need_less_than_two_blocks_of_rows(loss):
    rows, width, block = 96, 4096, 16
    student = torch.randn(2, rows, width, requires_grad=True)
    teacher = TeacherHidden(torch.randn(2, rows, 8), torch.randn(width, 8), block_rows=block)
    with Allocations() as mode:
        loss(student, teacher).backward()
    gradient = student.grad.untyped_storage().nbytes()
    assert mode.peak - gradient < 2 * block * width * 4
    assert mode.peak - gradient < gradient / 2  # and the bound above is one


@pytest.mark.parametrize("form", ["renormalize", "bucket"])
@pytest.mark.parametrize("name", ["uld", "jsd", "multi_level_ot"])
def test_a_top_k_does_not_wait_for_the_device(form, name):
    if form == "bucket" and name != "jsd":
        pytest.skip("bucket: refused by Multi-Level-OT, and in ULD made by blocks, which on a CPU may ask what counts")
    loss, options = LOSSES[name]
    size = {} if loss is divergence_loss else {"teacher_vocab_size": V}
    student, teacher = logits_of(B, T, V).requires_grad_(), FORMS[form]()
    with NoHostSync():
        loss(student, teacher, *LABELS, **options, **size).backward()


@pytest.mark.parametrize("form", ["hidden", "uniform", "bucket"])
def test_composes_with_compile_func_checkpoint_and_autocast(form):
    student, teacher = logits_of(B, T, V), FORMS[form]()

    def loss(z: Tensor) -> Tensor:
        return divergence_loss(z, teacher, *LABELS, kind="jsd")

    value, gradient = value_and_gradient(loss, student)
    whole = form == "bucket"  # what is made block by block is a break in the graph
    compiled = torch.compile(loss, fullgraph=whole, backend="aot_eager")
    ways = {
        "compile": value_and_gradient(compiled, student),
        "checkpoint": value_and_gradient(
            lambda z: torch.utils.checkpoint.checkpoint(loss, z, use_reentrant=False), student
        ),
        "func": torch.func.grad_and_value(loss)(student)[::-1],
        "autocast": value_and_gradient(torch.autocast("cpu", dtype=torch.bfloat16)(loss), student),
    }
    for way, (again, other) in ways.items():
        torch.testing.assert_close(again, value, msg=way)
        torch.testing.assert_close(other, gradient, msg=way)
