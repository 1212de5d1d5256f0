"""GoldLoss against the installed TRL's own class, call by call; ``test_trl_trainer.py`` trains."""

from __future__ import annotations

import inspect
import itertools
import os
import random

import pytest
import torch
from torch.nn import functional

pytest.importorskip("trl", reason="what these tests hold ours against is TRL itself: pip install -e '.[trl]'")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # a warning that its interfaces may change

from trl.experimental.gold import GOLDConfig, gold_trainer

from examples.trl_models import paragraphs, trained
from mlot_kernels import DivergenceLoss, HybridLoss, MultiLevelOTLoss, RankingLoss, ULDLoss, byte_offsets
from mlot_kernels.integrations.trl import GoldLoss
from tests import gold

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Vocabulary:
    """As much of a tokenizer as the losses ask for."""

    def __init__(self, numbers):
        self.numbers = numbers

    def get_vocab(self):
        return self.numbers


class Config:
    """The fields of GOLDConfig that the class reads, with their defaults: the whole asks for a machine to train on."""

    def __init__(self, **options):
        fields = {name: field.default for name, field in GOLDConfig.__dataclass_fields__.items()}
        names = [name for name in fields if "uld" in name or name == "beta"]
        assert options.keys() <= set(names)
        self.__dict__.update({name: fields[name] for name in names} | options)


def value_and_gradient(loss, student, *arguments):
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, *arguments)
    value.sum().backward()
    return value.detach().squeeze(), leaf.grad


def random_batch(seed, **options):
    """What the trainer hands the loss, and the tokenizers that it was made with."""
    batch = gold.batch(seed, **options)
    V_s, V_t = batch.student.shape[2], batch.teacher.shape[2]
    meeting = dict(batch.column_pairs.tolist())
    student = {f"token {meeting.get(i, -1 - i)}": i for i in range(V_s)}
    teacher = {f"token {i}": i for i in range(V_t)}
    return (*batch[:2], batch.student_labels, batch.teacher_labels, *batch[2:6]), (
        Vocabulary(student),
        Vocabulary(teacher),
    )


def real_batch(seed):
    """Prose as the trainer tokenizes it, prompts and padding of different lengths on the two sides, random logits."""
    tokenizers = trained("bpe", 800), trained("unigram", 900)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    texts = [*draw.sample(paragraphs()[:-20], 3), draw.choice(paragraphs()[-20:])]
    sides = []
    for tokenizer in tokenizers:
        ids, offsets = byte_offsets(tokenizer, texts)
        prompts = [draw.randint(1, 6) for _ in texts]
        width = max(p + len(own) + 1 for p, own in zip(prompts, ids, strict=True)) + 2
        table, labels = torch.zeros(4, width, dtype=torch.int64), torch.full((4, width), -100)
        where = torch.zeros(4, width, 2, dtype=torch.int64)
        for b, (p, own, text) in enumerate(zip(prompts, ids, texts, strict=True)):
            n = len(own)
            table[b, p : p + n] = torch.tensor(own)
            table[b, p + n] = tokenizer.eos_token_id
            labels[b, p : p + n + 1] = table[b, p : p + n + 1]
            where[b, p : p + n] = offsets[b, :n]
            where[b, p + n] = len(text.encode())
        logits = 3 * torch.randn(4, width, len(tokenizer), generator=generator, dtype=torch.float64)
        sides.append((logits, labels, table, where))
    return tuple(x for each in zip(*sides, strict=True) for x in each), tokenizers


MODES = [
    {"use_extended_uld": extended, "uld_token_merge_strategy": strategy, "uld_use_hybrid_loss": hybrid}
    for extended, strategy, hybrid in itertools.product((True, False), ("observed", "bayesian"), (False, True))
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(str(x) for x in mode.values()))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"uld_skip_student_eos": False, "uld_skip_teacher_eos": False, "uld_crossentropy_weight": 0.7},
        {"uld_student_temperature": 1.5, "uld_teacher_temperature": 0.8, "uld_distillation_weight": 2.5, "beta": 0.2},
        {"uld_hybrid_matched_weight": 0.9, "uld_hybrid_unmatched_weight": 0.3, "beta": 1.0},
        {"uld_skip_teacher_eos": False, "beta": 0.0},
    ],
    ids=["defaults", "all tokens", "temperatures", "weights", "one end"],
)
def test_equals_trl(mode, options):
    config = Config(**mode, **options)
    batches = [random_batch(seed, starts=starts) for seed, starts in enumerate([(1, 4), (0, 2), (0, 1)])]
    for arguments, tokenizers in [*batches, real_batch(0), real_batch(1)]:
        theirs = gold_trainer.ULDLoss(config, *tokenizers)
        expected = value_and_gradient(theirs, *arguments)
        loss = GoldLoss(config, *tokenizers)
        ours = value_and_gradient(loss, *arguments)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)
        if mode["uld_use_hybrid_loss"]:
            assert loss.last_matched_loss.shape == loss.last_unmatched_loss.shape == ()
            assert not loss.last_matched_loss.requires_grad


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(str(x) for x in mode.values()))
def test_float32_equals_trl(mode):
    arguments, tokenizers = real_batch(2)
    arguments = (arguments[0].float(), arguments[1].float(), *arguments[2:])
    config = Config(**mode)
    expected = value_and_gradient(gold_trainer.ULDLoss(config, *tokenizers), *arguments)
    ours = value_and_gradient(GoldLoss(config, *tokenizers), *arguments)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-6)
    # Sorted values that are next to equal may have either sign; their gradient is as small as a probability.
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-3, atol=1e-6)


def test_empty_answers_count_in_the_mean():
    arguments, tokenizers = random_batch(3)
    arguments[2][1] = -100
    config = Config()
    expected = value_and_gradient(gold_trainer.ULDLoss(config, *tokenizers), *arguments)
    for a, b in zip(value_and_gradient(GoldLoss(config, *tokenizers), *arguments), expected, strict=True):
        torch.testing.assert_close(a, b)
    arguments[2][:] = -100
    value, gradient = value_and_gradient(GoldLoss(config, *tokenizers), *arguments)
    assert value == 0
    assert (gradient == 0).all()


def test_other_losses_take_the_same_rows():
    arguments, _ = random_batch(4)
    masks = [labels != -100 for labels in arguments[2:4]]
    config = Config(use_extended_uld=False, uld_token_merge_strategy="bayesian")
    config.uld_skip_student_eos = config.uld_skip_teacher_eos = False
    for loss in (ULDLoss(), MultiLevelOTLoss(k=20)):
        ours = value_and_gradient(GoldLoss(config, loss=loss), *arguments)
        expected = value_and_gradient(loss, *arguments[:4])
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)
    vocabulary = Vocabulary({str(i): i for i in range(97)})
    same = (arguments[0], arguments[0].roll(1, 0), arguments[2], arguments[2], *arguments[4:])
    ours = GoldLoss(config, vocabulary, vocabulary, loss=RankingLoss())(*same)
    torch.testing.assert_close(ours, RankingLoss()(*same[:3], same[2]))
    assert masks[0].any()
    merged = GoldLoss(Config(), loss=MultiLevelOTLoss(k=20))(*arguments)
    assert merged.isfinite()


def test_the_crossentropy_is_torch_s():
    arguments, _ = random_batch(5)
    config = Config(uld_crossentropy_weight=0.5, uld_distillation_weight=0.0)
    value = GoldLoss(config)(*arguments)
    expected = functional.cross_entropy(arguments[0][:, :-1].flatten(0, 1), arguments[2][:, 1:].flatten())
    torch.testing.assert_close(value, 0.5 * expected)


def test_trl_is_as_it_was_read():
    """A change there is a red test here, and not a user's wrong loss."""
    theirs = gold_trainer.ULDLoss
    assert [*inspect.signature(theirs.__init__).parameters] == [
        "self",
        "config",
        "student_tokenizer",
        "teacher_tokenizer",
        "device",
    ]
    call = [
        "self",
        "student_logits",
        "teacher_logits",
        "student_labels",
        "teacher_labels",
        "student_input_ids",
        "teacher_input_ids",
        "student_byte_offsets",
        "teacher_byte_offsets",
    ]
    assert [*inspect.signature(theirs.__call__).parameters] == call
    assert [*inspect.signature(GoldLoss.forward).parameters] == call
    assert [*inspect.signature(gold_trainer.GOLDTrainer.compute_loss).parameters] == [
        "self",
        "model",
        "inputs",
        "return_outputs",
        "num_items_in_batch",
    ]
    source = inspect.getsource(theirs)
    read = {name for name in GOLDConfig.__dataclass_fields__ if f"config.{name}" in source or f'"{name}"' in source}
    assert read == {
        "uld_crossentropy_weight",
        "uld_distillation_weight",
        "uld_student_temperature",
        "uld_teacher_temperature",
        "uld_skip_student_eos",
        "uld_skip_teacher_eos",
        "use_extended_uld",
        "uld_token_merge_strategy",
        "uld_use_hybrid_loss",
        "uld_hybrid_matched_weight",
        "uld_hybrid_unmatched_weight",
        "beta",
    }
    trainer = inspect.getsource(gold_trainer.GOLDTrainer)
    asked = {
        line.split("self.uld_loss_fn.")[1].split()[0].strip("),:\n")
        for line in trainer.splitlines()
        if "self.uld_loss_fn." in line
    }
    assert {name.removesuffix(".item(") for name in asked} == {
        "use_extended_uld",
        "last_matched_loss",
        "last_unmatched_loss",
    }


ARGUMENTS, TOKENIZERS = random_batch(0)


@pytest.mark.parametrize(
    ("options", "loss", "error", "words"),
    [
        ({"uld_token_merge_strategy": "mean"}, None, ValueError, "uld_token_merge_strategy must be one of"),
        ({"uld_use_hybrid_loss": True}, None, ValueError, "pass both tokenizers"),
        ({"uld_use_hybrid_loss": True}, ULDLoss(), ValueError, "asks for HybridLoss, got loss=ULDLoss"),
        ({"uld_student_temperature": 2.0}, ULDLoss(), ValueError, "uld_student_temperature must be 1 where a loss"),
        ({}, DivergenceLoss(), TypeError, "loss must be one of HybridLoss, ULDLoss, .* got DivergenceLoss"),
        ({}, ULDLoss(reduction="sum"), ValueError, "must have reduction='mean', got 'sum'"),
        ({}, RankingLoss(), ValueError, "set use_extended_uld=False"),
        ({"use_extended_uld": False}, RankingLoss(), ValueError, "pass both tokenizers"),
    ],
)
def test_what_does_not_go_together_is_named(options, loss, error, words):
    with pytest.raises(error, match=words):
        GoldLoss(Config(**options), loss=loss)


def test_more_that_is_refused():
    with pytest.raises(ValueError, match="student_tokenizer and teacher_tokenizer have two"):
        GoldLoss(Config(use_extended_uld=False), *TOKENIZERS, loss=RankingLoss())
    with pytest.raises(ValueError, match="must be there with use_extended_uld=True"):
        GoldLoss(Config())(*ARGUMENTS[:6])
    loss = GoldLoss(Config(uld_use_hybrid_loss=True), *TOKENIZERS)
    with pytest.raises(ValueError, match="the teacher's tokenizer has the token 82, and its logits 70 columns"):
        loss(ARGUMENTS[0], ARGUMENTS[1][..., :70], *ARGUMENTS[2:])
    assert isinstance(loss.loss, HybridLoss)
