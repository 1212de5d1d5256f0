"""Python's own documentation under two tokenizers, and the positions at which the two agree.

Everything is deterministic: the same Python gives the same documents, tokenizers and chunks.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from types import ModuleType

import torch
from tokenizers import Encoding, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # the label of a token that is not learned
MODULES = """
    argparse ast asyncio base64 bisect calendar codecs collections configparser contextlib copy csv dataclasses datetime
    decimal difflib dis doctest email.message enum fractions functools gzip hashlib heapq html http.client inspect io
    ipaddress itertools json logging mailbox math multiprocessing operator optparse os pathlib pickle platform pprint
    queue random re sched selectors shelve shutil signal smtplib socket sqlite3 ssl statistics string struct subprocess
    tarfile tempfile textwrap threading time timeit tokenize trace traceback turtle typing unittest urllib.parse
    urllib.request uuid warnings weakref xml.dom.minidom xml.etree.ElementTree zipfile zlib
"""


@dataclass(frozen=True)
class Tokens:
    """Chunks of one side, padded to the longest.

    Attributes:
        ids: ``[N, T]`` int64, 0 behind a chunk's end.
        all_labels: ``[N, T]`` int64, the ids, unshifted; -100 behind a chunk's end.
        labels: the same, -100 too wherever the row that predicts the token has no counterpart on the other side.
        characters: ``[N, T]`` int64, how many characters a token covers.
        lengths: ``[N]`` int64.
    """

    ids: Tensor
    all_labels: Tensor
    labels: Tensor
    characters: Tensor
    lengths: Tensor

    @staticmethod
    def of(encodings: list[Encoding], shared_ends: list[set[int]]) -> Tokens:
        """Label what follows a token that ends at one of the chunk's ``shared_ends``."""
        ids, labels, characters = [], [], []
        for encoding, shared in zip(encodings, shared_ends, strict=True):
            # Row i predicts token i + 1, so that token's label stays only where token i ends on both sides.
            counts = (start >= end and end in shared for (_, end), (start, _) in itertools.pairwise(encoding.offsets))
            following = zip(encoding.ids[1:], counts, strict=True)
            ids.append(torch.tensor(encoding.ids))
            labels.append(torch.tensor([IGNORED, *(token if count else IGNORED for token, count in following)]))
            characters.append(torch.tensor([end - start for start, end in encoding.offsets]))
        return Tokens(
            pad_sequence(ids, batch_first=True),
            pad_sequence(ids, batch_first=True, padding_value=IGNORED),
            pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            pad_sequence(characters, batch_first=True),
            torch.tensor([len(chunk) for chunk in ids]),
        )

    def batch(self, indices: Tensor, device: torch.device) -> Tokens:
        """The chunks ``indices``, cut to the longest of them, on ``device``."""
        width = int(self.lengths[indices].max())
        fields = (self.ids, self.all_labels, self.labels, self.characters)
        return Tokens(*(field[indices, :width].to(device) for field in fields), self.lengths[indices])


@dataclass(frozen=True)
class Side:
    """One model's tokenizer and its view of the chunks, which come in the same order on both sides."""

    tokenizer: Tokenizer
    train: Tokens
    held_out: Tokens

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.get_vocab_size()


@dataclass(frozen=True)
class Corpus:
    """The two sides of one text.

    Attributes:
        teacher, student: the same chunks under each side's tokenizer.
        train, held_out: the chunks' text.
        aligned: the share of the student's predicting positions that have a counterpart on the teacher's side.
    """

    teacher: Side
    student: Side
    train: list[str]
    held_out: list[str]
    aligned: float


def build(teacher_vocabulary: int, student_vocabulary: int, chunk: int, documents: int | None = None) -> Corpus:
    """Read the documentation, train both tokenizers on the train part, and cut both parts into aligned chunks.

    Args:
        chunk: the length of a chunk in characters, at most.
        documents: read that many only; None: all.
    """
    texts = list(itertools.islice(_documents(), documents))
    random.Random(0).shuffle(texts)
    held_out, train = texts[: len(texts) // 10], texts[len(texts) // 10 :]
    # A part of the text is enough for the tokenizers, and much faster.
    tokenizers = _byte_pair(train[::3], teacher_vocabulary), _unigram(train[::3], student_vocabulary)
    train_chunks, held_out_chunks = (
        [piece for text in part for piece in re.findall(rf".{{1,{chunk}}}(?: |$)", text) if len(piece) > chunk // 2]
        for part in (train, held_out)
    )
    parts = [_tokens(tokenizers, chunks) for chunks in (train_chunks, held_out_chunks)]
    teacher, student = (Side(*side) for side in zip(tokenizers, *parts, strict=True))
    tokens = student.train
    aligned = (tokens.labels != IGNORED).sum() / (tokens.all_labels[:, 1:] != IGNORED).sum()
    return Corpus(teacher, student, train_chunks, held_out_chunks, float(aligned))


def _tokens(tokenizers: Sequence[Tokenizer], chunks: list[str]) -> list[Tokens]:
    """Each tokenizer's view of the same chunks, a label only where the tokenizers end at the same character."""
    encodings = [tokenizer.encode_batch(chunks) for tokenizer in tokenizers]
    shared = [set.intersection(*map(_ends, chunk)) for chunk in zip(*encodings, strict=True)]
    return [Tokens.of(encoded, shared) for encoded in encodings]


def _documents() -> Iterator[str]:
    """The language reference's topics, then each module's docstrings; whitespace becomes single spaces."""
    for _, text in sorted(topics.items()):
        yield " ".join(text.split())
    for name in MODULES.split():
        try:
            module = importlib.import_module(name)
        except ImportError:  # left out of this Python
            continue
        yield " ".join(" ".join(_docstrings(module)).split())


def _docstrings(module: ModuleType) -> Iterator[str]:
    yield module.__doc__ or ""
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
            continue
        yield inspect.getdoc(member) or ""
        if inspect.isclass(member):
            for name, method in sorted(vars(member).items()):
                if not name.startswith("_") and callable(method):
                    yield method.__doc__ or ""


def _byte_pair(texts: list[str], size: int) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _unigram(texts: list[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>"], unk_token="<unk>", max_piece_length=12, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer adds up in an order that changes from run to run, and so do the last digits of its scores; its pieces
    # do not. They get as scores the logs of their frequencies in the segmentation into fewest pieces.
    pieces = sorted(tokenizer.get_vocab())
    tokenizer.model = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=pieces.index("<unk>"))
    count = Counter(i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids)
    scores = [math.log((count[i] + 1) / (count.total() + len(pieces))) for i in range(len(pieces))]
    tokenizer.model = models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=pieces.index("<unk>"))
    return tokenizer


def _ends(encoding: Encoding) -> set[int]:
    """Where tokens end, in characters; not inside a character whose bytes are several tokens."""
    return {end for (_, end), (start, _) in itertools.pairwise(encoding.offsets) if start >= end}
