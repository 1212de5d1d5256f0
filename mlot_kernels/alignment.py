"""Two tokenizations of one text: groups of tokens that end at the same byte.

Everything here but ``byte_offsets`` runs on the tensors' device without waiting for it, a whole batch at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.rows import Rows

TRAILING = ("merge", "drop")


@dataclass(frozen=True, eq=False)
class Alignment:
    """Groups of a student's and a teacher's tokens, in compressed sparse rows: group g of sequence b has the tokens
    ``first[b, g] .. first[b, g + 1] - 1`` of each side, numbered among those that count.

    Attributes:
        student_first, teacher_first: ``[B, G + 1]`` int64; from ``count`` on the number of tokens in groups.
        count: ``[B]`` int64, how many groups there are.
        student_tokens, teacher_tokens: which tokens count, as ``Rows``.
        coverage: ``[B]`` float32, the part of the student's tokens that are in a group that ends at a common byte; 0
            where none counts.
    """

    student_first: Tensor
    teacher_first: Tensor
    count: Tensor
    student_tokens: Rows
    teacher_tokens: Rows
    coverage: Tensor

    def to(self, device: torch.device | str) -> Alignment:
        """The same groups on another device: a collator may align on the CPU."""
        return Alignment(*(getattr(self, field.name).to(device) for field in fields(self)))


def align_byte_offsets(
    student_offsets: Tensor,
    teacher_offsets: Tensor,
    student_tokens: Tensor | Rows | None = None,
    teacher_tokens: Tensor | Rows | None = None,
    *,
    trailing: str = "merge",
) -> Alignment:
    """Cut both tokenizations wherever both have a token that ends at the same byte.

    Tokens that end where the one before ends, special tokens mostly, begin the next group; where both sides have one,
    the second end meets the second end, and so on, as in a walk of two pointers (TRL's ``ULDLoss``, which this equals).

    Args:
        student_offsets: ``[B, T_s, 2]``, teacher_offsets: ``[B, T_t, 2]``; int32 or int64, first byte and end of every
            token in one text, see ``byte_offsets``. An end in front of the one before counts as that.
        student_tokens, teacher_tokens: which tokens count: a bool mask ``[B, T]`` or ``Rows`` of the tokens themselves
            (labels that are not -100, not the rows that predict them); None: all.
        trailing: what becomes of what both sides have behind the last common end. ``"merge"``: it is one more group, as
            in TRL. ``"drop"``: it is in none.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or value.
    """
    checks.choice("trailing", trailing, TRAILING)
    for name, offsets in (("student_offsets", student_offsets), ("teacher_offsets", teacher_offsets)):
        checks.tensor(name, offsets, "[B, T, 2]", checks.INTEGERS)
        checks.sized(name, offsets, (*offsets.shape[:2], 2), "[B, T, 2]")
    if len(student_offsets) != len(teacher_offsets):
        raise ValueError(
            "student_offsets and teacher_offsets must have the same batch size, got "
            f"{tuple(student_offsets.shape)} and {tuple(teacher_offsets.shape)}"
        )
    checks.same_device(student_offsets=student_offsets, teacher_offsets=teacher_offsets)
    student = _tokens(student_tokens, student_offsets, "student_tokens")
    teacher = _tokens(teacher_tokens, teacher_offsets, "teacher_tokens")
    width = max(student.index.shape[1], teacher.index.shape[1]) + 1
    # What does not count lies behind everything, at a different place on either side.
    behind = torch.iinfo(torch.int64).max
    keys = _ends(student_offsets, student, width, behind), _ends(teacher_offsets, teacher, width, behind - 1)
    partner = _partners(*keys)  # [B, A_s], the teacher's token that ends where this one does; -1 for none
    closes = partner >= 0
    closed = closes.sum(1)
    G = min(student.index.shape[1], teacher.index.shape[1])
    own = torch.arange(student.index.shape[1], device=partner.device).expand_as(partner)
    first = [_starts(closes, token, closed, G) for token in (own, partner)]  # [B, G + 1]
    ended = [
        each.gather(1, closed[:, None]).squeeze(1) for each in first
    ]  # [B], tokens in front of the last common end
    coverage = ended[0] / student.count.clamp(min=1)
    count = closed
    if trailing == "merge":
        rest = (ended[0] < student.count) & (ended[1] < teacher.count)
        count = closed + rest
        slot = torch.arange(G + 1, device=closed.device)
        last = rest[:, None] & (slot > closed[:, None])
        first = [torch.where(last, rows.count[:, None], f) for f, rows in zip(first, (student, teacher), strict=True)]
    return Alignment(first[0], first[1], count, student, teacher, coverage.float())


def _tokens(value: Any, offsets: Tensor, name: str) -> Rows:
    if isinstance(value, Tensor) and value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool mask [B, T], Rows or None, got {value.dtype}; pass labels != -100")
    return Rows.of(value, offsets, shift=0, name=name)


def _ends(offsets: Tensor, rows: Rows, width: int, behind: int) -> Tensor:
    """Ascending keys ``[B, A]``, one for each end of a token that counts and which one of equal ends it is."""
    B, A = rows.index.shape
    if A == 0:
        return offsets.new_zeros(B, 0, dtype=torch.int64)
    ends = offsets[..., 1].long().gather(1, rows.index.clamp(min=0)).clamp(min=0)
    ends = ends.masked_fill(~rows.counted, torch.iinfo(torch.int64).max // (2 * width)).cummax(1).values
    place = torch.arange(A, device=ends.device)
    begins = torch.ones_like(rows.counted)
    begins[:, 1:] = ends[:, 1:] != ends[:, :-1]
    which = place - torch.where(begins, place, 0).cummax(1).values
    return (ends * width + which).masked_fill(~rows.counted, behind)


def _partners(keys: Tensor, others: Tensor) -> Tensor:
    """For each of ``keys`` ``[B, A]`` where it is among ``others`` ``[B, A']``, both ascending; -1 where it is not."""
    if others.shape[1] == 0:
        return torch.full_like(keys, -1)
    at = torch.searchsorted(others, keys).clamp(max=others.shape[1] - 1)
    return at.masked_fill(others.gather(1, at) != keys, -1)


def _starts(closes: Tensor, token: Tensor, closed: Tensor, G: int) -> Tensor:
    """``[B, G + 1]``: 0, and behind each ``token`` ``[B, A]`` that closes a group; from ``closed`` on the last one."""
    group = closes.cumsum(1).masked_fill(~closes, G + 1)  # what closes none goes to a column that is cut
    starts = closed.new_zeros(len(closes), G + 2).scatter(1, group, token + 1)
    slot = torch.arange(G + 1, device=closes.device).expand(len(closes), G + 1)
    return starts.gather(1, torch.minimum(slot, closed[:, None]))


def byte_offsets(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = False) -> tuple[list[Any], Tensor]:
    """Tokens of texts, and where they lie in the texts' UTF-8 bytes.

    Several tokens may share a character: byte-level tokenizers and SentencePiece's byte fallback cut emoji and rare
    scripts into bytes. Each then ends at its own byte.

    Args:
        tokenizer: a fast tokenizer of Hugging Face: ``tokenizers.Tokenizer``, or one of transformers that has one.
        texts: each is tokenized by itself.
        add_special_tokens: as the tokenizer takes it; special tokens that stand for no text are empty, and lie where
            the token in front of them ends.

    Returns:
        The ids of each text, a list of lists, and the offsets int64 ``[B, T, 2]``, first byte and end of every token,
        T as the longest text has it; (0, 0) behind the last token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "encode_batch"):
        raise TypeError(
            f"tokenizer must be a fast tokenizer of Hugging Face, got {type(tokenizer).__name__}, which does not say "
            "where its tokens lie; load it with use_fast=True"
        )
    if isinstance(texts, str):
        raise TypeError("texts must be a list of texts, got one str; pass [text]")
    byte_level = "ByteLevel" in repr(backend.pre_tokenizer) or "ByteLevel" in repr(backend.decoder)
    encodings = backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
    offsets = [_of_text(text, encoding, byte_level) for text, encoding in zip(texts, encodings, strict=True)]
    table = torch.zeros(len(offsets), max(map(len, offsets), default=0), 2, dtype=torch.int64)
    for row, own in zip(table, offsets, strict=True):
        row[: len(own)] = torch.tensor(own, dtype=torch.int64).view(-1, 2)
    return [list(encoding.ids) for encoding in encodings], table


def _of_text(text: str, encoding: Any, byte_level: bool) -> list[tuple[int, int]]:
    if byte_level:
        pieces = [b"" if special else _bytes_of(piece) for piece, special in _pieces(encoding)]
        prefix = int(b"".join(pieces) == b" " + text.encode())  # that some tokenizers put in front
        if prefix or b"".join(pieces) == text.encode():
            ends = [max(0, end - prefix) for end in itertools.accumulate(map(len, pieces))]
            return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []
    return _by_characters(text, encoding, byte_level)


def _by_characters(text: str, encoding: Any, byte_level: bool) -> list[tuple[int, int]]:
    """By the characters that the tokenizer says a token stands for, which several tokens may share."""
    in_bytes = [0]  # where each character begins
    for character in text:
        in_bytes.append(in_bytes[-1] + len(character.encode()))
    spans = list(encoding.offsets)
    found, end = [], 0
    for i, ((start, stop), (piece, _)) in enumerate(zip(spans, _pieces(encoding), strict=True)):
        if start == stop:  # stands for no text
            found.append((end, end))
            continue
        begin = max(end, in_bytes[start])
        end = in_bytes[stop]
        after = next((first for first, last in spans[i + 1 :] if last > first), len(text))
        if after < stop:  # the next token has a part of the last character, or all of it
            end = min(end, begin + _width_of_part(piece, text[start], byte_level))
        found.append((begin, end))
    return found


def _pieces(encoding: Any) -> list[tuple[str, int]]:
    """Each token's letters, and whether it was put there and stands for no text."""
    return list(zip(encoding.tokens, encoding.special_tokens_mask, strict=True))


def _width_of_part(piece: str, character: str, byte_level: bool) -> int:
    """How many bytes of the text, from ``character`` on, are the token's."""
    if byte_level:
        return len(_bytes_of(piece))
    if piece.startswith("<0x") and piece.endswith(">"):  # SentencePiece's byte fallback
        return 1
    if not piece.strip("▁") and not character.isspace():  # put in front of the text
        return 0
    return len(piece.replace("▁", " ").encode())


def _bytes_of(piece: str) -> bytes:
    """What a byte-level tokenizer's letters stand for; a letter that is none of them stands for itself."""
    return b"".join(_LETTERS[c] if c in _LETTERS else c.encode() for c in piece)


def _byte_letters() -> dict[str, bytes]:
    """Byte-level tokenizers write printable Latin-1 as it is, and the other bytes, in order, as letters from 256 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in shown)
    return {chr(byte): bytes([byte]) for byte in shown} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}


_LETTERS = _byte_letters()
