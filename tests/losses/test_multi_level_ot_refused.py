"""What MultiLevelOTLoss refuses, and in which words."""

import pytest
import torch

from mlot_kernels import MultiLevelOTLoss, Rows, multi_level_ot_loss
from tests.losses.examples import logits_of

S, T = logits_of(2, 4, 9), logits_of(2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((S[0], T), {}, ValueError, r"student_logits must be \[B, T, V\], got \(4, 9\)"),
        ((S, T.long()), {}, TypeError, "teacher_logits must be one of"),
        ((S, T[:1]), {}, ValueError, "same batch size, got"),
        ((S, T.to("meta")), {}, ValueError, "student_logits on cpu, teacher_logits on meta"),
        (
            (S, T, torch.ones(2, 5).long()),
            {},
            ValueError,
            r"student_labels must be \[B, T\] as its logits, \(2, 4\) here",
        ),
        ((S, T, torch.ones(2, 4)), {}, TypeError, "student_labels must be one of"),
        ((S, T, None, "all"), {}, TypeError, "teacher_labels must be a tensor"),
        ((S, T, Rows.every(3, 4)), {}, ValueError, "student_labels.count must be"),
        ((S, T), {"k": 0}, ValueError, "k must be at least 1"),
        ((S, T), {"scope": "word"}, ValueError, "scope must be one of"),
        ((S, T), {"matching": "best"}, ValueError, "matching must be one of 'sum', 'greedy', 'optimal', got 'best'"),
        (
            (S, T),
            {"matching": "greedy", "scope": "batch"},
            ValueError,
            "matching='greedy' matches the columns of a sequence, got scope='batch'; pass scope='sequence' or matching",
        ),
        ((S, T), {"matching": "optimal", "scope": "token"}, ValueError, "got scope='token'"),
        ((S, T), {"epsilon": 0}, ValueError, "epsilon must be above 0"),
        ((S, T), {"transport_temperature": -1}, ValueError, "transport_temperature must be above 0"),
        ((S, T), {"absolute_weight": "1"}, TypeError, "absolute_weight must be a number"),
        ((S, T), {"shift": -1}, ValueError, "shift must be at least 0"),
        ((S, T), {"student_vocab_size": 10}, ValueError, "student_vocab_size must be .* at most 9"),
        ((S, T), {"reduction": "batchmean"}, ValueError, "reduction must be one of 'mean', 'sum', 'none'"),
        (
            (S, T),
            {"reduction": "sum", "num_items_in_batch": 2},
            ValueError,
            "num_items_in_batch replaces the denominator",
        ),
        ((S, T), {"num_items_in_batch": 0}, ValueError, "num_items_in_batch must be above 0"),
        ((S, T), {"num_items_in_batch": torch.ones(2)}, ValueError, "num_items_in_batch must hold one number"),
        ((S, T), {"token_weight": torch.ones(2, 5)}, ValueError, r"token_weight must be \[B, T\] as student_logits"),
        ((S, T), {"temperature": 2}, TypeError, "temperature"),
    ],
)
def test_bad_input_is_named(arguments, options, error, words):
    if "shift" in options:
        arguments = (*arguments, torch.ones(2, 4).long())
    with pytest.raises(error, match=words):
        multi_level_ot_loss(*arguments, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0},
        {"reduction": "x"},
        {"matching": "x"},
        {"epsilon": -1},
        {"iterations": 0},
        {"marginals": "x"},
        {"shift": -3},
        {"backend": "x"},
        {"transport_temperature": 0},
    ],
    ids=str,
)
def test_a_module_names_bad_options_at_once(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MultiLevelOTLoss(**options)
