"""Distil a small language model into a smaller one with another tokenizer, on Python's own documentation.

Run ``python -m examples.distill --output demo``. It needs no download: the text is the documentation of the running
Python, and all models are trained here from nothing. Two tokenizers cut the text differently; row i of a model's
logits predicts token i + 1, and a row counts where token i ends at the same character on both sides. The labels of all
other tokens are masked, so that the counted rows of the two sides belong together one to one.

First the main loss is checked against its definition and measured beside hand-written PyTorch; then the student is
trained with cross-entropy + weight x loss, once per loss and once with cross-entropy alone, from the same weights and
on the same batches. The exit status is 1 where a check fails, or where a loss does not fall on held-out text and end
lower there than with cross-entropy alone.

``results.json`` holds
    settings    quick, device, threads, python, torch, and the fields of ``training.Settings``
    corpus      train_characters, train_chunks, held_out_chunks, aligned_share (of the student's rows)
    teacher     vocabulary, parameters, cross_entropy_per_token (held out, counted rows), seconds
    near_teacher   the same of a teacher that has the student's tokenizer, for the losses that compare columns
    student     vocabulary, parameters, cross_entropy_per_token (before distillation), seconds
    check       backend, shapes (of the student's and the teacher's logits), rows, differences and tolerances (both with
                value, gradient, by_hand; relative), passed, measured: a list of name, value, milliseconds (median) and
                peak_mebibytes
    runs        a list, cross-entropy alone first: name, weight (null for cross-entropy alone), seconds (of training),
                steps (at which held-out text was read), cross_entropy_per_token, cross_entropy_per_character and, per
                loss, distillation[loss], each a list of held-out values at those steps; fell (null where weight is):
                its own loss ended lower than it began, and lower than with cross-entropy alone
    seconds     of everything
    passed      whether the exit status is 0
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import mlot_kernels as mlot
from examples import report
from examples.check import TOLERANCES, check
from examples.corpus import build
from examples.training import QUICK, Distillation, Entry, Settings


class TokenTransport(nn.Module):
    """``SequenceTransportLoss`` as a loss of logits: the features of a token are its 50 largest probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = mlot.SequenceTransportLoss(metric="l1")

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, student: mlot.Rows, teacher: mlot.Rows) -> Tensor:
        features = (
            mlot.topk_softmax(mlot.Logits(logits, rows), 50).log_probabilities.exp()  # [B, A, 50]
            for logits, rows in ((student_logits, student), (teacher_logits, teacher))
        )
        return self.loss(*features, student.count, teacher.count)


# A loss joins by a line. Its weight stands beside a cross-entropy that is a mean over tokens, while the paper's loss is
# a sum over a sequence's rows; 1.5 is the published code's.
LOSSES = [
    Entry("MultiLevelOT, paper", mlot.MultiLevelOTLoss.paper(), weight=0.03),
    Entry("MultiLevelOT, official", mlot.MultiLevelOTLoss.official(), weight=1.5),
    Entry("MultiLevelOT, greedy", mlot.MultiLevelOTLoss(matching="greedy"), weight=0.03),
    Entry("SequenceTransport", TokenTransport(), weight=1.5),
    Entry("ULD", mlot.ULDLoss(), weight=1.5),
    Entry("Jensen-Shannon", mlot.DivergenceLoss("jsd"), weight=3.0, one_vocabulary=True),
    Entry("Ranking, paper", mlot.RankingLoss.paper(), weight=0.5, one_vocabulary=True),
]


def main(arguments: list[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    start = time.perf_counter()
    options = _options(arguments)
    settings = QUICK if options.quick else Settings()
    if options.steps is not None:
        settings = dataclasses.replace(settings, steps=options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)

    with console.status("Reading the documentation, training two tokenizers"):
        corpus = build(settings.teacher_vocabulary, settings.student_vocabulary, settings.chunk, settings.documents)
    with Progress(console=console) as progress:
        distillation = Distillation(corpus, settings, options.device, progress)
        teacher, student = distillation.teacher, distillation.student
        report.print_corpus(console, corpus, teacher.size, student.size)
        seconds = {
            "teacher": distillation.pretrain("teacher", teacher, corpus.teacher, settings.teacher_steps, seed=0),
            "near_teacher": distillation.pretrain(
                "near teacher", distillation.near_teacher, corpus.student, settings.near_teacher_steps, seed=0
            ),
            "student": distillation.pretrain("student", student, corpus.student, settings.student_steps, seed=1),
        }
        checked = check(distillation.forward(student, "held_out", distillation.held_out[0]), settings.repeats)
        report.print_check(console, checked)
        alone, _ = distillation.run(None, LOSSES)
        runs, students = zip(*(distillation.run(entry, [entry], alone) for entry in LOSSES), strict=True)

    report.draw(options.output / "distill.png", alone, runs, distillation.plan(students[0]))
    results: dict[str, Any] = {
        "settings": {
            "quick": options.quick,
            "device": str(options.device),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            **dataclasses.asdict(settings),
        },
        "corpus": {
            "train_characters": sum(map(len, corpus.train)),
            "train_chunks": len(corpus.train),
            "held_out_chunks": sum(map(len, distillation.held_out)),
            "aligned_share": corpus.aligned,
        },
        "teacher": {
            "vocabulary": corpus.teacher.vocabulary,
            "parameters": teacher.size,
            "cross_entropy_per_token": distillation.teacher_cross_entropy(),
            "seconds": seconds["teacher"],
        },
        "near_teacher": {
            "vocabulary": corpus.student.vocabulary,
            "parameters": distillation.near_teacher.size,
            "cross_entropy_per_token": distillation.teacher_cross_entropy(near=True),
            "seconds": seconds["near_teacher"],
        },
        "student": {
            "vocabulary": corpus.student.vocabulary,
            "parameters": student.size,
            "cross_entropy_per_token": alone.cross_entropy_per_token[0],
            "seconds": seconds["student"],
        },
        "check": {**dataclasses.asdict(checked), "tolerances": TOLERANCES, "passed": checked.passed},
        "runs": [dataclasses.asdict(run) for run in (alone, *runs)],
        "seconds": time.perf_counter() - start,
        "passed": checked.passed and all(run.fell for run in runs),
    }
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    report.print_runs(console, alone, runs, results, options.output)
    return 0 if results["passed"] else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.distill", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for results.json and distill.png")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--steps", type=int, help="distillation steps of each run")
    parser.add_argument("--quick", action="store_true", help="all of it at a small size, in under a minute")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
