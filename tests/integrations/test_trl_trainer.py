"""TRL's GOLDTrainer with our losses: a few steps of tiny models, through each way in."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("trl", reason="these tests train with TRL: pip install -e '.[trl]'")
pytest.importorskip("accelerate", reason="TRL's trainers need it: pip install -e '.[trl]'")
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true"}

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl.experimental.gold import GOLDConfig, GOLDTrainer, gold_trainer

from mlot_kernels import MultiLevelOTLoss
from mlot_kernels.integrations.trl import FusedGOLDTrainer, GoldLoss, patch_gold, unpatch_gold
from tests.conftest import FULL
from tests.integrations.tokenizers import paragraphs, trained

pytestmark = pytest.mark.filterwarnings("ignore")  # those of TRL, transformers and datasets


class Log(TrainerCallback):
    def __init__(self):
        self.losses, self.norms = [], []

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs["grad_norm"]))


def model(tokenizer, width):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Both, and the folders that the trainer reads them from."""
    made = []
    for name, kind, size in (("student", "bpe", 800), ("teacher", "unigram", 900)):
        tokenizer, folder = trained(kind, size), tmp_path_factory.mktemp(name)
        tokenizer.save_pretrained(folder)
        made.append((tokenizer, str(folder)))
    return made


def train(tokenizers, folder, *, trainer=GOLDTrainer, after=None, steps=2, batch=2, splits=1, **options):
    """Losses and gradient norms of every step, and the trainer's loss."""
    torch.manual_seed(0)
    (own, student_folder), (other, teacher_folder) = tokenizers
    student, teacher = model(own, 32), model(other, 48)
    student.config._name_or_path, teacher.config._name_or_path = student_folder, teacher_folder
    rows = []
    for text in paragraphs()[:16]:
        cut = text.find(" ", 60)
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": text[:cut]},
                    {"role": "assistant", "content": text[cut + 1 : cut + 80]},
                ]
            }
        )
    config = GOLDConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch // splits,
        gradient_accumulation_steps=splits,
        learning_rate=2e-3,
        use_uld_loss=True,
        teacher_tokenizer_name_or_path=teacher_folder,
        max_length=128,
        max_completion_length=16,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        gradient_checkpointing=False,
        **{"lmbda": 0.0, "bf16": False} | options,
    )
    log = Log()
    made = trainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=own,
        callbacks=[log],
    )
    if after is not None:
        after(made)
    made.train()
    return log, made


def swap(trainer):
    trainer.uld_loss_fn = GoldLoss.of(trainer)


@pytest.mark.parametrize("way", ["attribute", "symbol", "subclass"])
@pytest.mark.parametrize("hybrid", [False, True])
def test_every_way_in_trains_as_stock_does(tokenizers, tmp_path, way, hybrid):
    stock, _ = train(tokenizers, tmp_path, uld_use_hybrid_loss=hybrid)
    assert gold_trainer.ULDLoss is not GoldLoss
    if way == "symbol":
        patch_gold()
    try:
        ours, made = train(
            tokenizers,
            tmp_path,
            trainer=FusedGOLDTrainer if way == "subclass" else GOLDTrainer,
            after=swap if way == "attribute" else None,
            uld_use_hybrid_loss=hybrid,
        )
    finally:
        unpatch_gold()
    assert type(made.uld_loss_fn) is GoldLoss
    assert len(ours.losses) == 2
    assert ours.losses == pytest.approx(stock.losses, rel=1e-4)
    assert ours.norms == pytest.approx(stock.norms, rel=1e-3)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(tokenizers, tmp_path, splits):
    whole, _ = train(tokenizers, tmp_path, trainer=FusedGOLDTrainer, batch=4, steps=1)
    split, _ = train(tokenizers, tmp_path, trainer=FusedGOLDTrainer, batch=4, steps=1, splits=splits)
    assert split.losses == pytest.approx(whole.losses, rel=1e-4)
    assert split.norms == pytest.approx(whole.norms, rel=1e-3)


@pytest.mark.skipif(not FULL, reason="every mode of the trainer takes a minute: MLOT_TEST_FULL=1")
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"use_extended_uld": False}], ids=["float32", "bf16", "rows"])
@pytest.mark.parametrize("lmbda", [0.0, 1.0], ids=["off policy", "on policy"])
@pytest.mark.parametrize("strategy", ["observed", "bayesian"])
def test_modes(tokenizers, tmp_path, options, lmbda, strategy):
    options = options | {"lmbda": lmbda, "uld_token_merge_strategy": strategy}
    stock, _ = train(tokenizers, tmp_path, **options)
    ours, _ = train(tokenizers, tmp_path, trainer=FusedGOLDTrainer, **options)
    rough = 10 if options.get("bf16") else 1  # the first step's difference in a last place grows
    assert ours.losses == pytest.approx(stock.losses, rel=rough * 1e-4)
    assert ours.norms == pytest.approx(stock.norms, rel=rough * 1e-3)


def test_another_loss(tokenizers, tmp_path):
    log, made = train(
        tokenizers,
        tmp_path,
        trainer=lambda **arguments: FusedGOLDTrainer(loss=MultiLevelOTLoss(k=20), **arguments),
        batch=16,  # the whole data, so that every step has the same
        steps=4,
    )
    assert isinstance(made.uld_loss_fn.loss, MultiLevelOTLoss)
    assert log.losses[-1] < log.losses[0]
