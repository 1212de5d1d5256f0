"""What two tokenizers' vocabularies have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def shared_tokens(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The tokens that both vocabularies spell alike, as ``column_pairs``.

    Spelled alike means equal strings, as in TRL's GOLD: tokenizers that write a space before a word in different ways
    (``"▁"``, ``"Ġ"``) share no such word.

    Args:
        student_tokenizer, teacher_tokenizer: have ``get_vocab()``, a dict from a token's string to its number:
            ``tokenizers.Tokenizer``, and those of transformers.
        student_vocab_size, teacher_vocab_size: the widths of the models' logits; tokens from there on, which a
            tokenizer may have more of than its model, are left out. None: none are.
        device: of the result.

    Returns:
        int64 ``[P, 2]``, the student's number and the teacher's, in the order of the teacher's.
    """
    student, teacher = (
        _vocabulary(name, tokenizer, size)
        for name, tokenizer, size in (
            ("student_tokenizer", student_tokenizer, student_vocab_size),
            ("teacher_tokenizer", teacher_tokenizer, teacher_vocab_size),
        )
    )
    pairs = sorted((number, student[token]) for token, number in teacher.items() if token in student)
    table = torch.tensor([(own, other) for other, own in pairs], dtype=torch.int64, device=device)
    return table.view(len(pairs), 2)


def _vocabulary(name: str, tokenizer: Any, size: int | None) -> dict[str, int]:
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"{name} must have get_vocab(), got {type(tokenizer).__name__}; pass the tokenizer itself")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return {token: number for token, number in vocabulary.items() if size is None or number < size}
