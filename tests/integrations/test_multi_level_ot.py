from types import SimpleNamespace

import pytest
import torch

from bench.baselines.multi_level_ot import published_loss
from mlot_kernels import official_multi_level_ot_loss
from mlot_kernels.integrations.multi_level_ot import DistillationLoss
from tests.losses.examples import labels_of, logits_of


def test_takes_and_gives_what_the_published_class_does():
    student, teacher = logits_of(2, 8, 60).requires_grad_(), logits_of(2, 9, 70)
    labels = labels_of(8, (2, 4), (3, 3)), labels_of(9, (2, 4), (3, 5))
    before = student.detach().clone()
    loss = DistillationLoss(
        crossentropy_weight=2, distillation_weight=1.5, student_temperature=2, skip_student_eos=True
    )
    outputs = SimpleNamespace(logits=student, loss=student.logsumexp(-1).mean()), SimpleNamespace(logits=teacher)
    total, crossentropy, distillation = loss(3, *outputs, *labels, rank=1)
    torch.testing.assert_close(crossentropy, 2 * outputs[0].loss)
    expected = published_loss(student, teacher, *labels, student_temperature=2, skip_student_eos=True)
    torch.testing.assert_close(distillation, 1.5 * expected)
    torch.testing.assert_close(total, crossentropy + distillation)
    total.backward()
    assert student.grad.isfinite().all()
    assert torch.equal(student, before)
    assert loss.on_epoch_end() is None


def test_another_ignored_label_is_used():
    student, teacher = logits_of(1, 8, 60), logits_of(1, 8, 70)
    labels = labels_of(8, (2, 4))
    outputs = SimpleNamespace(logits=student, loss=torch.zeros(())), SimpleNamespace(logits=teacher)
    usual = DistillationLoss()(0, *outputs, labels, labels)[2]
    other = DistillationLoss(ignore_index=-1)(0, *outputs, *[labels.masked_fill(labels == -100, -1)] * 2)[2]
    torch.testing.assert_close(other, usual)


def test_f_chooses_the_matching():
    student, teacher = logits_of(2, 8, 60), logits_of(2, 9, 70)
    labels = labels_of(8, (2, 4), (3, 3)), labels_of(9, (2, 4), (3, 5))
    outputs = SimpleNamespace(logits=student, loss=torch.zeros(())), SimpleNamespace(logits=teacher)
    for f, matching in ((1, "sum"), (2, "greedy")):
        distillation = DistillationLoss(f=f)(0, *outputs, *labels)[2]
        expected = official_multi_level_ot_loss(student, teacher, *labels, matching=matching)
        torch.testing.assert_close(distillation, expected)


def test_what_has_no_effect_is_named():
    with pytest.warns(UserWarning, match="DistillationLoss: store_path, debug, tokenizer_student have no effect here"):
        DistillationLoss(store_path="x.npy", debug=True, tokenizer_student="gpt2")


@pytest.mark.filterwarnings("error")
def test_defaults_do_not_warn():
    DistillationLoss(batch_limit=100, debug=False, f=1)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"f must be 1 .* or 2 \(greedy matching\), got 3"):
        DistillationLoss(f=3)
    with pytest.raises(TypeError, match="distillation_weight must be a number"):
        DistillationLoss(distillation_weight="1")
    outputs = SimpleNamespace(logits=logits_of(1, 4, 9), loss=None), SimpleNamespace(logits=logits_of(1, 4, 9))
    labels = labels_of(4, (1, 2))
    with pytest.raises(ValueError, match=r"student_predictions\.loss is None; call the student with labels"):
        DistillationLoss()(0, *outputs, labels, labels)
