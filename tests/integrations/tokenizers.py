"""Two tokenizers trained in place on prose that comes with Python."""

from __future__ import annotations

from functools import cache
from pydoc_data.topics import topics
from typing import Any

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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
