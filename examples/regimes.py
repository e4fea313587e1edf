# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D101, D102  (Lightning and torch document their hooks)
"""Batch, stochastic and mini-batch gradient descent, by one callback each, with the same number of samples to spend.

Real data: scikit-learn's 1,797 handwritten digits of 8x8 pixels. Draws the loss over all training images against the
samples seen and against the time taken, and prints what it came to. One thread, one seed.

    python examples/regimes.py [--fast] [--docs] [--output reports/regimes.svg]
"""

import argparse
import logging
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import matplotlib
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import BatchRegime

SEED = 7
FIGURE = Path(__file__).parents[1] / "docs/figures/regimes.svg"


# --- a user's own module and data: nothing here knows of lightning_optkit ---


class DigitClassifier(pl.LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def digits() -> tuple[TensorDataset, TensorDataset]:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=360, stratify=labels, random_state=SEED)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) / 16 for part in split[:2])
    train_y, test_y = (torch.tensor(part) for part in split[2:])
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


# --- three runs ---


@dataclass
class Run:
    """One regime, at the learning rate of 0.005, 0.01, 0.02, 0.05, ..., 5 that leaves the lowest loss in the end."""

    name: str
    regime: Literal["full", "single"] | int
    lr: float
    steps: int = 0
    accuracy: float = 0.0
    samples: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # without the time taken by looking
    losses: list[float] = field(default_factory=list)


RUNS = [
    Run("batch", "full", lr=1.0),
    Run("mini-batch of 32", 32, lr=1.0),
    Run("stochastic", "single", lr=0.1),
]

# To be told apart in print.
STYLES: list[dict[str, Any]] = [
    {"marker": "o", "markersize": 3.5},
    {"linewidth": 2.2},
    {"linewidth": 1.0, "marker": "x", "markersize": 4},
]


class Curve(Callback):
    """Looks at the loss over all training images, at sample counts that grow by a tenth."""

    def __init__(self, run: Run, data: TensorDataset, progress: Progress, epochs: int) -> None:
        self.run, self.data, self.progress = run, data, progress
        self.total = epochs * len(data)
        self.task = progress.add_task(run.name, total=self.total)
        self.seen, self.next_look, self.looking, self.started = 0, 0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.perf_counter()
        self.look(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen += len(batch[0])
        stepped = trainer.global_step > self.run.steps
        self.run.steps = trainer.global_step
        if self.seen % 256 == 0 or self.seen == self.total:
            self.progress.update(self.task, completed=self.seen)
        if stepped and (self.seen >= self.next_look or self.seen == self.total):
            self.look(pl_module)

    @torch.no_grad()
    def look(self, module: pl.LightningModule) -> None:
        began = time.perf_counter()
        images, labels = self.data.tensors
        self.run.samples.append(self.seen)
        self.run.seconds.append(began - self.started - self.looking)
        self.run.losses.append(F.cross_entropy(module(images), labels).item())
        self.next_look = max(self.seen + 1, int(self.seen * 1.1))
        self.looking += time.perf_counter() - began


def train(run: Run, train_data: TensorDataset, test_data: TensorDataset, epochs: int, progress: Progress) -> None:
    pl.seed_everything(SEED, verbose=False)
    module, curve = DigitClassifier(run.lr), Curve(run, train_data, progress, epochs)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[BatchRegime(run.regime), curve],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    # 256 bounds the memory of the full batch; the other two change it.
    trainer.fit(module, DataLoader(train_data, batch_size=256, shuffle=True))
    images, labels = test_data.tensors
    with torch.no_grad():
        run.accuracy = (module(images).argmax(dim=1) == labels).float().mean().item()


# --- what came of it ---


def show(console: Console, runs: list[Run]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("regime")
    for heading in ("rate", "steps", "training loss", "test accuracy", "seconds", "images/s"):
        table.add_column(heading, justify="right")
    for run in runs:
        seconds = run.seconds[-1]
        numbers = (f"{run.lr:g}", f"{run.steps:,}", f"{run.losses[-1]:.4f}", f"{run.accuracy:.1%}")
        table.add_row(run.name, *numbers, f"{seconds:.1f}", f"{run.samples[-1] / seconds:,.0f}")
    console.print(table)


def draw(runs: list[Run], path: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "regimes"
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for run, style in zip(runs, STYLES, strict=True):
        left.plot(run.samples[1:], run.losses[1:], **style, label=f"{run.name}, {run.steps:,} steps")
        right.plot(run.seconds[1:], run.losses[1:], **style)
    left.set(title="for the same samples", xlabel="training images seen", ylabel="loss over all training images")
    right.set(title="for the same time", xlabel="seconds, one thread")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    left.set_xlim(left=20)  # before that, nothing has happened
    right.set_xlim(left=4e-3)
    left.legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="2 epochs instead of 20")
    parser.add_argument("--docs", action="store_true", help=f"write {FIGURE.name} into docs/figures")
    parser.add_argument("--output", type=Path, default=Path("reports/regimes.svg"), help="the picture, .svg or .png")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)  # the model is small: a second thread would mostly wait

    data, console = digits(), Console(highlight=False, markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("images"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for run in RUNS:
            train(run, *data, epochs=2 if options.fast else 20, progress=progress)
    show(console, RUNS)
    path = FIGURE if options.docs else options.output
    draw(RUNS, path)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
