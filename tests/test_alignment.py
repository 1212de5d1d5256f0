import random

import pytest
import torch

from mlot_kernels import Rows, align_byte_offsets, byte_offsets
from tests.dispatch_modes import NoHostSync
from tests.gold import walk

TEXTS = [
    "Plain words, and some more of them.",
    "Emoji 👩🏽‍🚀 and flags 🇳🇱, 漢字かな交じり文, и кириллица.",
    "Combining: é ñ̃ Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍, العربية  two  spaces\n\tand a tab\n",
    "x",
    "",
    "   leading and trailing   ",
    "naïve café über straße ☕️☕️☕️ 🏳️‍🌈🏳️‍🌈",
]


def groups_of(alignment, b: int) -> tuple[list[list[int]], list[list[int]]]:
    count = int(alignment.count[b])
    sides = (alignment.student_first[b].tolist(), alignment.teacher_first[b].tolist())
    return tuple([list(range(first[g], first[g + 1])) for g in range(count)] for first in sides)


def offsets_of(*ends: list[int]) -> torch.Tensor:
    width = max(map(len, ends), default=0)
    table = torch.zeros(len(ends), width, 2, dtype=torch.int64)
    for row, own in zip(table, ends, strict=True):
        row[: len(own), 1] = torch.tensor(own, dtype=torch.int64)
        row[1 : len(own), 0] = row[: max(0, len(own) - 1), 1]
    return table


def lengths_mask(ends: list[list[int]]) -> torch.Tensor:
    width = max(map(len, ends), default=0)
    return torch.tensor([[i < len(own) for i in range(width)] for own in ends], dtype=torch.bool).view(len(ends), width)


@pytest.mark.parametrize("trailing", ["merge", "drop"])
@pytest.mark.parametrize("seed", range(8))
def test_random_segmentations_are_those_of_a_walk(seed, trailing):
    draw = random.Random(seed)

    def segmentation(length: int) -> list[int]:
        """Ends of tokens, some of no width, and not always to the text's end."""
        ends = sorted(draw.sample(range(1, length + 1), draw.randint(0, length)))
        ends += [draw.choice(ends) for _ in range(draw.randint(0, 3))] if ends else []
        return sorted(ends)

    lengths = [draw.randint(1, 40) for _ in range(16)]
    student, teacher = ([segmentation(length) for length in lengths] for _ in range(2))
    alignment = align_byte_offsets(
        offsets_of(*student), offsets_of(*teacher), lengths_mask(student), lengths_mask(teacher), trailing=trailing
    )
    for b, (s, t) in enumerate(zip(student, teacher, strict=True)):
        assert groups_of(alignment, b) == walk(s, t, trailing), (s, t)
        closed = walk(s, t, "drop")[0]
        expected = sum(map(len, closed)) / len(s) if s else 0.0
        assert alignment.coverage[b].item() == pytest.approx(expected)


def test_it_is_trls_walk():
    trainer = pytest.importorskip("trl.experimental.gold.gold_trainer", reason="the walk is TRL's")
    draw = random.Random(3)
    for _ in range(50):
        student, teacher = (sorted(draw.sample(range(1, 60), draw.randint(1, 40))) for _ in range(2))
        pairs = trainer.ULDLoss._align_by_byte_offsets(*([(0, end) for end in ends] for ends in (student, teacher)))
        both = [(s, t) for s, t in zip(*pairs, strict=False) if s and t]
        ours = groups_of(align_byte_offsets(offsets_of(student), offsets_of(teacher)), 0)
        assert list(zip(*ours, strict=True)) == both


def test_only_tokens_that_count_are_compared():
    offsets = offsets_of([9, 2, 5, 7])
    tokens = torch.tensor([[False, True, True, True]])
    alignment = align_byte_offsets(offsets, offsets_of([5, 7]), tokens)
    assert groups_of(alignment, 0) == ([[0, 1], [2]], [[0], [1]])
    assert alignment.student_tokens.index[0, :3].tolist() == [1, 2, 3]
    by_rows = align_byte_offsets(offsets, offsets_of([5, 7]), Rows.from_mask(tokens))
    assert torch.equal(by_rows.student_first, alignment.student_first)
    nothing = align_byte_offsets(offsets, offsets_of([5, 7]), torch.zeros_like(tokens))
    assert nothing.count.item() == nothing.coverage.item() == 0
    empty = align_byte_offsets(offsets_of([]), offsets_of([5, 7]))
    assert empty.count.item() == 0


def test_it_does_not_wait_for_the_device():
    ends = [[1, 2, 5], [3, 4]]
    with NoHostSync():
        align_byte_offsets(offsets_of(*ends), offsets_of([2, 5], [4]), lengths_mask(ends))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(1, 3, 2), offsets_of([1])), {}, TypeError, "student_offsets must be one of torch.int32"),
        ((offsets_of([1]), torch.zeros(1, 3, 3).long()), {}, ValueError, "teacher_offsets must be"),
        ((offsets_of([1]), offsets_of([1], [2])), {}, ValueError, "same batch size"),
        ((offsets_of([1]), offsets_of([1])), {"trailing": "keep"}, ValueError, "trailing must be one of"),
        ((offsets_of([1]), offsets_of([1]), torch.ones(1, 1).long()), {}, TypeError, "pass labels != -100"),
        ((offsets_of([1]), offsets_of([1]), torch.ones(1, 2).bool()), {}, ValueError, "student_tokens must be"),
    ],
)
def test_bad_input_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        align_byte_offsets(*arguments, **options)


def trained(kind: str):
    """A tokenizer of few tokens, so that rare characters fall into bytes."""
    tokenizers = pytest.importorskip("tokenizers", reason="it tokenizes")
    t = tokenizers
    if kind.startswith("byte-level"):
        tokenizer = t.Tokenizer(t.models.BPE())
        tokenizer.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = t.decoders.ByteLevel()
        trainer = t.trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=t.pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"]
        )
        tokenizer.train_from_iterator(TEXTS * 3, trainer)
        if kind.endswith("trimmed"):
            tokenizer.post_processor = t.processors.ByteLevel(trim_offsets=True)
        return tokenizer
    tokenizer = t.Tokenizer(t.models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = t.pre_tokenizers.Metaspace()
    tokenizer.decoder = t.decoders.Sequence([t.decoders.ByteFallback(), t.decoders.Metaspace()])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    plain = [text for text in TEXTS if text.isascii()]
    tokenizer.train_from_iterator(plain, t.trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *fallback]))
    return tokenizer


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, trimmed", "byte fallback"])
def test_offsets_say_which_bytes_a_token_stands_for(kind):
    tokenizer = trained(kind)
    ids, offsets = byte_offsets(tokenizer, TEXTS)
    assert len(ids) == len(offsets) == len(TEXTS)
    alphabet = bytes_of_letters()
    for text, own, rows in zip(TEXTS, ids, offsets.tolist(), strict=True):
        whole, ends = text.encode(), [end for _, end in rows[: len(own)]]
        assert ends == sorted(ends)
        assert all(row == [0, 0] for row in rows[len(own) :])
        if own:
            assert ends[-1] == len(whole)
        before = 0
        for token, end in zip(own, ends, strict=True):
            piece = tokenizer.id_to_token(token)
            if kind.startswith("byte-level"):
                assert bytes(alphabet[letter] for letter in piece) == whole[before:end]
            elif piece.startswith("<0x"):
                assert bytes([int(piece[3:5], 16)]) == whole[before:end]
            else:
                assert piece.replace("▁", " ").strip() == whole[before:end].decode().strip()
            before = end


def bytes_of_letters() -> dict[str, int]:
    """The letters in which byte-level tokenizers write bytes: printable ones as they are, others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def test_two_tokenizers_meet_at_common_ends():
    student, teacher = trained("byte-level"), trained("byte fallback")
    (ids_s, offsets_s), (ids_t, offsets_t) = byte_offsets(student, TEXTS), byte_offsets(teacher, TEXTS)
    masks = [
        torch.tensor([[i < len(own) for i in range(offsets.shape[1])] for own in ids])
        for ids, offsets in ((ids_s, offsets_s), (ids_t, offsets_t))
    ]
    alignment = align_byte_offsets(offsets_s, offsets_t, *masks)
    for b, text in enumerate(TEXTS):
        ends = [offsets[b, : len(ids[b]), 1].tolist() for ids, offsets in ((ids_s, offsets_s), (ids_t, offsets_t))]
        assert groups_of(alignment, b) == walk(*ends, "merge")
        assert (alignment.coverage[b] == 1) == bool(text)  # both end where the text does


def test_special_tokens_stand_for_no_text():
    tokenizers = pytest.importorskip("tokenizers", reason="it tokenizes")
    tokenizer = trained("byte-level")
    end = tokenizer.token_to_id("<end>")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", end)]
    )
    ids, offsets = byte_offsets(tokenizer, ["one two"], add_special_tokens=True)
    assert ids[0][-1] == end
    assert offsets[0, -1].tolist() == [7, 7]


def test_a_tokenizer_that_does_not_say_where_its_tokens_lie_is_refused():
    with pytest.raises(TypeError, match="fast tokenizer"):
        byte_offsets(object(), ["text"])
    with pytest.raises(TypeError, match="got one str"):
        byte_offsets(trained("byte-level"), "text")
