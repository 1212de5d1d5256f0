"""Tiny models, tokenizers trained in place on prose that comes with Python, and a run of TRL's GOLDTrainer on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

# Before TRL is imported: nothing is downloaded or reported, and no warning that its interfaces may change.
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true"}

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gold import GOLDConfig, GOLDTrainer

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>"]
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@cache
def paragraphs() -> list[str]:
    """English of 120 to 400 characters, a few with what takes more than a byte."""
    prose = [p.replace("\n", " ").strip() for text in topics.values() for p in text.split("\n\n")]
    prose = [p for p in prose if 120 < len(p) < 400]
    return [*prose, *(p[:150] + " naïve 漢字 ☕️🏳️‍🌈 é" for p in prose[:20])]


@cache
def trained(kind: str, size: int) -> Any:
    """``"bpe"`` or ``"unigram"``, byte-level, of ``size`` tokens, as transformers has them."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": size, "initial_alphabet": alphabet, "show_progress": False}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(special_tokens=SPECIAL, **options)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", **options)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(paragraphs(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = CHAT
    return fast


def model(tokenizer: Any, width: int) -> LlamaForCausalLM:
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


def trainer_of(
    folder: Path,
    *,
    trainer: Callable[..., GOLDTrainer] = GOLDTrainer,
    sizes: tuple[int, int] = (800, 900),
    texts: int = 16,
    answer: int = 80,
    batch: int = 2,
    splits: int = 1,
    **options: Any,
) -> GOLDTrainer:
    """A student of ``sizes[0]`` byte-level BPE tokens and a teacher of ``sizes[1]`` Unigram ones, both untrained.

    Args:
        folder: where tokenizers are saved, for the trainer reads the teacher's from there.
        trainer: the class, or what makes one of its arguments.
        texts: paragraphs to train on, each cut into a prompt and an answer of up to ``answer`` characters.
        batch: texts a step, in ``splits`` micro-batches.
        options: further fields of ``GOLDConfig``.
    """
    torch.manual_seed(0)
    tokenizers = trained("bpe", sizes[0]), trained("unigram", sizes[1])
    both = []
    for tokenizer, name, width in zip(tokenizers, ("student", "teacher"), (32, 48), strict=True):
        tokenizer.save_pretrained(folder / name)
        both.append(model(tokenizer, width))
        both[-1].config._name_or_path = str(folder / name)
    rows = []
    for text in paragraphs()[:texts]:
        cut = text.find(" ", 60)
        question = {"role": "user", "content": text[:cut]}
        rows.append({"messages": [question, {"role": "assistant", "content": text[cut + 1 :][:answer]}]})
    config = GOLDConfig(
        output_dir=str(folder / "output"),
        per_device_train_batch_size=batch // splits,
        gradient_accumulation_steps=splits,
        use_uld_loss=True,
        teacher_tokenizer_name_or_path=str(folder / "teacher"),
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        gradient_checkpointing=False,
        **{"learning_rate": 2e-3, "max_length": 128, "max_completion_length": 16, "lmbda": 0.0, "bf16": False}
        | options,
    )
    return trainer(
        model=both[0],
        teacher_model=both[1],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizers[0],
    )
