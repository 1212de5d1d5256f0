"""TRL's GOLDTrainer with its own loss and with ours: the same curves, in less time and memory.

Run ``python -m examples.trl_gold --output demo`` with the extra ``trl`` installed. It needs no download: two
tokenizers are trained here on prose that comes with Python, and the models are tiny and untrained. Each run is a
process of its own, from the same weights and on the same batches, off policy, in float32 on the CPU. The exit status is
1 where a step's loss differs by more than 1e-3 of it: the first ones agree to some last places, and every step of the
optimizer, which divides small gradients by their size, makes more of the difference.

``trl_gold.json`` holds ``settings``, and ``runs``, a list of name, losses, and ``seconds_per_step`` (all of a step, the
models' part included) and ``seconds_of_loss`` (the loss's forward), medians over steps, and ``mebibytes_of_loss``, the
most that the loss's forward of one batch held at a time beyond its inputs, what backward needs included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from examples.check import peak_bytes_cpu

SETTINGS: dict[str, Any] = {
    "sizes": (3000, 4000),
    "texts": 64,
    "answer": 250,
    "batch": 4,
    "max_steps": 20,
    "max_length": 256,
    "uld_use_hybrid_loss": True,
}
STOCK, OURS = "TRL", "mlot_kernels"
TOLERANCE = 1e-3


class Meter:
    """Calls a loss, and keeps what every call took; the first is measured for memory, which makes it slow."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.seconds, self.bytes = loss, [], None

    def __getattr__(self, name: str) -> Any:  # what the trainer asks the loss for
        return getattr(self.loss, name)

    def __call__(self, **inputs: Any) -> Any:
        if self.bytes is None:
            value, self.bytes = peak_bytes_cpu(lambda: self.loss(**inputs))
            return value
        start = time.perf_counter()
        value = self.loss(**inputs)
        self.seconds.append(time.perf_counter() - start)
        return value


def run(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    from transformers import TrainerCallback
    from transformers.utils import logging

    from examples.trl_models import trainer_of
    from mlot_kernels.integrations.trl import GoldLoss

    logging.set_verbosity_error()
    losses, seconds = [], []

    class Log(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(Path(folder), disable_tqdm=True, **settings)
        if name == OURS:
            trainer.uld_loss_fn = GoldLoss.of(trainer)  # the one line
        trainer.uld_loss_fn = Meter(trainer.uld_loss_fn)
        trainer.add_callback(Log())
        trainer.train()
    meter = trainer.uld_loss_fn
    return {
        "name": name,
        "losses": losses,
        "seconds_per_step": statistics.median(seconds[1:]),
        "seconds_of_loss": statistics.median(meter.seconds),
        "mebibytes_of_loss": meter.bytes / 2**20,
    }


def _child(name: str, settings: dict[str, Any], sender: Any) -> None:
    sender.send(run(name, settings))


def _apart(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """``run`` in a process of its own, whose memory is nobody else's."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, settings, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the run {name!r} died; its messages stand above") from None
    finally:
        process.join()


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for made, style in zip(runs, ({"linewidth": 4, "color": "#a9a9a9"}, {"color": "#1f5a92"}), strict=True):
        axes.plot(range(1, len(made["losses"]) + 1), made["losses"], label=made["name"], **style)
    axes.set(xlabel="step", ylabel="loss", title="GOLD's hybrid loss in TRL's trainer")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for trl_gold.json and trl_gold.svg")
    parser.add_argument(
        "--steps",
        type=int,
        choices=range(2, 1000),
        metavar="N",
        default=SETTINGS["max_steps"],
        help="optimizer steps of either run",
    )
    parsed = parser.parse_args(arguments)
    settings = SETTINGS | {"max_steps": parsed.steps}
    runs = [_apart(name, settings) for name in (STOCK, OURS)]
    table = Table("", "last loss", "ms a step", "ms of the loss", "MiB of the loss")
    for made in runs:
        table.add_row(
            made["name"],
            f"{made['losses'][-1]:.5f}",
            f"{1e3 * made['seconds_per_step']:.0f}",
            f"{1e3 * made['seconds_of_loss']:.1f}",
            f"{made['mebibytes_of_loss']:.1f}",
        )
    Console().print(table)
    parsed.output.mkdir(parents=True, exist_ok=True)
    (parsed.output / "trl_gold.json").write_text(json.dumps({"settings": settings, "runs": runs}, indent=1))
    draw(runs, parsed.output / "trl_gold.svg")
    stock, ours = (made["losses"] for made in runs)
    worst = max(abs(a - b) / abs(a) for a, b in zip(stock, ours, strict=True))
    Console().print(f"The losses of {len(stock)} steps differ by {worst:.1e} at most.")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
