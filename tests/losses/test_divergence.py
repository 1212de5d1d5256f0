import pytest
import torch
import torch.nn.functional as F

from mlot_kernels import DivergenceLoss, divergence_loss, row_divergence
from mlot_kernels.ops.row_divergence.reference import KINDS
from tests.losses.examples import labels_of, logits_of, value_and_gradient


def test_forward_kl_is_torchs_kl_div_over_the_answers_tokens():
    student, teacher = logits_of(2, 6, 30), logits_of(2, 6, 30)
    labels = labels_of(6, (1, 4), (2, 3))
    rows = torch.zeros(2, 6, dtype=torch.bool)
    rows[0, 0:4] = rows[1, 1:4] = True  # row i predicts token i + 1
    ours = value_and_gradient(divergence_loss, student, teacher, labels, labels)
    expected = value_and_gradient(
        lambda s, t: F.kl_div(s[rows].log_softmax(-1), t[rows].softmax(-1), reduction="batchmean"), student, teacher
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_reductions_weights_and_components(kind):
    student, teacher = logits_of(2, 6, 20), logits_of(2, 8, 20)
    labels = labels_of(6, (1, 4), (0, 0)), labels_of(8, (3, 4), (0, 0))
    each = row_divergence(student[:1, 0:4], teacher[:1, 2:6], kind=kind)[0]
    loss = DivergenceLoss(kind, reduction="none")(student, teacher, *labels)
    assert loss.shape == (2, 6)
    torch.testing.assert_close(loss[0, :4], each)
    assert (loss[0, 4:] == 0).all()
    assert (loss[1] == 0).all()
    torch.testing.assert_close(divergence_loss(student, teacher, *labels, kind=kind, reduction="sum"), each.sum())
    mean, parts = divergence_loss(student, teacher, *labels, kind=kind, return_components=True)
    torch.testing.assert_close(mean, each.mean())
    torch.testing.assert_close(parts["divergence"], mean)
    assert parts["rows"].item() == 4
    weight = torch.arange(6.0).expand(2, 6)
    weighted = divergence_loss(student, teacher, *labels, kind=kind, token_weight=weight)
    torch.testing.assert_close(weighted, (each * weight[0, :4]).sum() / weight[0, :4].sum())
    accumulated = divergence_loss(student, teacher, *labels, kind=kind, num_items_in_batch=torch.tensor(16))
    torch.testing.assert_close(accumulated, each.sum() / 16)


def test_no_counted_row_is_0_and_connected():
    nothing = torch.full((1, 4), -100)
    student = torch.full((1, 4, 9), float("nan"))
    value, gradient = value_and_gradient(divergence_loss, student, logits_of(1, 4, 9), nothing, nothing)
    assert value == 0
    assert (gradient == 0).all()


def test_a_sequence_with_other_spans_on_its_two_sides_shows():
    student, teacher = logits_of(2, 6, 20), logits_of(2, 6, 20)
    one, two = labels_of(6, (1, 4), (1, 4)), labels_of(6, (1, 4), (1, 1, 3, 1))
    assert divergence_loss(student, teacher, one, two, reduction="none").isnan().any(1).tolist() == [False, True]
    assert divergence_loss(student, teacher, one, two).isnan()


def test_bad_options_are_refused_when_the_module_is_made():
    with pytest.raises(ValueError, match="kind must be one of"):
        DivergenceLoss("kl")
    with pytest.raises(ValueError, match="student_temperature must be above 0"):
        DivergenceLoss(student_temperature=0.0)
