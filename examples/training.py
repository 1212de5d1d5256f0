"""The two models on one corpus, and the runs that distil one into the other."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor, nn

import mlot_kernels as mlot
from examples.corpus import Corpus, Side, Tokens
from examples.models import LanguageModel, cross_entropy, optimizer_for


@dataclass(frozen=True)
class Entry:
    """A loss that the student is trained with.

    Attributes:
        loss: called as ``loss(student_logits, teacher_logits, student_rows, teacher_rows)``.
        weight: of the loss beside the cross-entropy, which is a mean over tokens.
        one_vocabulary: the loss compares columns, and so takes the teacher that has the student's tokenizer.
    """

    name: str
    loss: nn.Module
    weight: float
    one_vocabulary: bool = False


@dataclass(frozen=True)
class Settings:
    """Sizes of everything.

    Attributes:
        teacher_model, student_model: width, layers and heads.
        documents: how many are read; None: all.
        chunk: characters, at most.
        batch, held_out: chunks.
        teacher_steps, near_teacher_steps, student_steps: before distillation, with cross-entropy on all tokens; the
            near teacher is of the teacher's size and has the student's tokenizer.
        steps: of each run.
        evaluations: readings of held-out text in a run, after the first.
        repeats: of what is timed.
    """

    teacher_vocabulary: int = 2048
    student_vocabulary: int = 1500
    teacher_model: tuple[int, int, int] = (128, 3, 4)
    student_model: tuple[int, int, int] = (64, 2, 2)
    documents: int | None = None
    chunk: int = 256
    batch: int = 8
    held_out: int = 24
    teacher_steps: int = 250
    near_teacher_steps: int = 120
    student_steps: int = 5
    steps: int = 50
    evaluations: int = 5
    learning_rate: float = 2e-3
    repeats: int = 7


QUICK = Settings(
    teacher_vocabulary=600,
    student_vocabulary=500,
    teacher_model=(48, 2, 2),
    student_model=(32, 1, 2),
    documents=40,
    chunk=160,
    held_out=16,
    teacher_steps=60,
    near_teacher_steps=40,
    student_steps=5,
    steps=20,
    evaluations=4,
    repeats=3,
)


@dataclass
class Run:
    """One training of the student.

    Attributes:
        weight: None for cross-entropy alone.
        steps: at which held-out text was read; the lists below hold the values there.
        distillation: by loss; all losses for cross-entropy alone, else the run's own.
        seconds: of training.
        fell: whether the run's own loss did, and further than with cross-entropy alone, which lowers it, too; None for
            cross-entropy alone.
    """

    name: str
    weight: float | None
    steps: list[int] = field(default_factory=list)
    cross_entropy_per_token: list[float] = field(default_factory=list)
    cross_entropy_per_character: list[float] = field(default_factory=list)
    distillation: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    fell: bool | None = None


class Plan(NamedTuple):
    """A transport plan ``[teacher's tokens][student's tokens]``; a token is the text that it covers."""

    teacher_tokens: list[str]
    student_tokens: list[str]
    mass: list[list[float]]


class Both(NamedTuple):
    """A batch of chunks as a student and a teacher see it; logits ``[B, T, V]``."""

    student_logits: Tensor
    teacher_logits: Tensor
    student: Tokens
    teacher: Tokens

    def rows(self) -> tuple[mlot.Rows, mlot.Rows]:
        """The counted rows; masking breaks a chunk into many runs, which are one span all the same."""
        student, teacher = (mlot.Rows.from_labels(side.labels, spans="one") for side in (self.student, self.teacher))
        return student, teacher


class Distillation:
    """The corpus, the models and the held-out batches that all runs share."""

    def __init__(self, corpus: Corpus, settings: Settings, device: torch.device, progress: Progress) -> None:
        self.corpus, self.settings, self.device, self.progress = corpus, settings, device, progress
        torch.manual_seed(0)
        self.teacher, self.student, self.near_teacher = (
            LanguageModel(side.vocabulary, *model, longest=max(side.train.ids.shape[1], side.held_out.ids.shape[1])).to(
                device
            )
            for side, model in (
                (corpus.teacher, settings.teacher_model),
                (corpus.student, settings.student_model),
                (corpus.student, settings.teacher_model),
            )
        )
        self.held_out = torch.arange(len(corpus.held_out))[: settings.held_out].split(settings.batch)

    def pretrain(self, name: str, model: LanguageModel, side: Side, steps: int, seed: int) -> float:
        """Train on all tokens with cross-entropy; returns seconds."""
        start = time.perf_counter()
        optimizer = optimizer_for(model, self.settings.learning_rate)
        for indices in self.progress.track(self._batches(steps, seed), description=name):
            batch = side.train.batch(indices, self.device)
            _step(model, optimizer, cross_entropy(model(batch.ids), batch.all_labels))
        return time.perf_counter() - start

    def forward(self, student: LanguageModel, part: str, indices: Tensor, *, near: bool = False) -> Both:
        """The student and a teacher on the chunks ``indices`` of ``part``, ``"train"`` or ``"held_out"``."""
        teacher, its_side = (self.near_teacher, self.corpus.student) if near else (self.teacher, self.corpus.teacher)
        student_tokens, teacher_tokens = (
            getattr(side, part).batch(indices, self.device) for side in (self.corpus.student, its_side)
        )
        with torch.no_grad():
            teacher_logits = teacher(teacher_tokens.ids)
        return Both(student(student_tokens.ids), teacher_logits, student_tokens, teacher_tokens)

    def run(self, entry: Entry | None, watched: Sequence[Entry], alone: Run | None = None) -> tuple[Run, LanguageModel]:
        """Train a copy of the student with cross-entropy and, beside it, ``entry``.

        Args:
            watched: the losses that are read on held-out text.
            alone: the run with cross-entropy alone; ``entry`` must end lower than it does there.
        """
        model = copy.deepcopy(self.student)
        optimizer = optimizer_for(model, self.settings.learning_rate)
        run = Run(entry.name, entry.weight) if entry else Run("cross-entropy alone", None)
        self._evaluate(run, model, watched, 0)
        every = max(1, self.settings.steps // self.settings.evaluations)
        batches = self._batches(self.settings.steps, seed=2)
        for step, indices in enumerate(self.progress.track(batches, description=run.name), 1):
            start = time.perf_counter()
            both = self.forward(model, "train", indices, near=entry is not None and entry.one_vocabulary)
            objective = cross_entropy(both.student_logits, both.student.labels)
            if entry is not None:
                loss = entry.loss(both.student_logits, both.teacher_logits, *both.rows())
                objective = objective + entry.weight * loss
            _step(model, optimizer, objective)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            run.seconds += time.perf_counter() - start
            if step % every == 0 or step == self.settings.steps:
                self._evaluate(run, model, watched, step)
        if entry is not None:
            values = run.distillation[entry.name]
            run.fell = values[-1] < values[0] and (alone is None or values[-1] < alone.distillation[entry.name][-1])
        return run, model

    @torch.no_grad()
    def teacher_cross_entropy(self, *, near: bool = False) -> float:
        """Per token, over the counted rows of the held-out chunks."""
        nats, tokens = 0.0, 0
        for indices in self.held_out:
            both = self.forward(self.student, "held_out", indices, near=near)
            batch = both.teacher
            nats += float(cross_entropy(both.teacher_logits, batch.labels, reduction="sum"))
            tokens += int((batch.labels >= 0).sum())
        return nats / tokens

    @torch.no_grad()
    def plan(self, student: LanguageModel) -> Plan:
        """The paper's transport plan between all positions of a held-out sentence."""
        sentence = _sentence(self.corpus.held_out)
        features, tokens = [], []
        for model, side in ((self.teacher, self.corpus.teacher), (student, self.corpus.student)):
            encoding = side.tokenizer.encode(sentence)
            logits = model(torch.tensor([encoding.ids], device=self.device))
            ranked = mlot.rank_truncate(logits, k=50, also_at=(2.0,))
            features.append(ranked.log_probabilities[1].exp())  # [1, T, 50], at temperature 2
            tokens.append([sentence[start:end] for start, end in encoding.offsets])
        cost = mlot.pairwise_cost(*features, metric="l1")  # [1, T_t, T_s]
        transport = mlot.sinkhorn(cost, epsilon=0.1, iterations=20, marginals="unit", return_plan=True)
        return Plan(*tokens, transport.plan[0].tolist())

    def _batches(self, steps: int, seed: int) -> Sequence[Tensor]:
        """Indices of train chunks, ``[batch]`` for each step."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(self.corpus.train), (steps, self.settings.batch), generator=generator).unbind()

    @torch.no_grad()
    def _evaluate(self, run: Run, model: LanguageModel, watched: Sequence[Entry], step: int) -> None:
        """Append held-out values; a loss is the mean over batches, weighted by their sizes."""
        nats, tokens, characters = 0.0, 0, 0
        totals = dict.fromkeys((entry.name for entry in watched), 0.0)
        for indices in self.held_out:
            for near in sorted({entry.one_vocabulary for entry in watched}):
                both = self.forward(model, "held_out", indices, near=near)
                for entry in watched:
                    if entry.one_vocabulary == near:
                        value = entry.loss(both.student_logits, both.teacher_logits, *both.rows())
                        totals[entry.name] += len(indices) * float(value)
            counted = both.student.labels >= 0
            nats += float(cross_entropy(both.student_logits, both.student.labels, reduction="sum"))
            tokens += int(counted.sum())
            characters += int(both.student.characters[counted].sum())
        run.steps.append(step)
        run.cross_entropy_per_token.append(nats / tokens)
        run.cross_entropy_per_character.append(nats / characters)
        for name, total in totals.items():
            run.distillation.setdefault(name, []).append(total / sum(map(len, self.held_out)))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, objective: Tensor) -> None:
    optimizer.zero_grad()
    objective.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _sentence(chunks: Sequence[str]) -> str:
    """The first plain sentence that fits a figure."""
    sentences = (s for chunk in chunks for s in re.findall(r"(?<=\. )[A-Z][A-Za-z ,]{54,84}\.(?= )", chunk))
    return next(sentences, chunks[0][:70])
