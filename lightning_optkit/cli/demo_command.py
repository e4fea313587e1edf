# SPDX-License-Identifier: Apache-2.0

"""`optkit demo`: an ordinary Lightning run, then the same run with `Fuse` and a folded average.

Real data: scikit-learn's 1,797 handwritten digits of 8x8 pixels. Both runs start from one seed and use one thread of
the processor, so that the accuracies are the same every time.
"""

import logging
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, Report, WeightAveraging
from lightning_optkit.cli.quiet_start import LIGHTNINGS_LOGGERS
from lightning_optkit.diagnostics import RunRecord, result_rows, write_report
from lightning_optkit.diagnostics._files import why_unwritable
from lightning_optkit.step import GroupPlan, OnePassOptimizer

__all__ = ["add_options", "demo"]

SEED = 7
EMA_DECAY = 0.98


# --- a user's own module and data: nothing here knows of lightning_optkit ---


class Block(nn.Module):
    """A residual block of two convolutions, each after its norm and GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.gelu(self.norm1(x)))
        added: Tensor = x + self.conv2(F.gelu(self.norm2(y)))
        return added


class DigitClassifier(pl.LightningModule):
    """A small residual network for images of (N, 1, 8, 8), with AdamW and a cosine decay of its own."""

    def __init__(self, channels: int = 24, num_blocks: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, kernel_size=3, padding=1, stride=2)
        self.blocks = nn.Sequential(*[Block(channels) for _ in range(num_blocks)])
        self.head = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_acc", (logits.argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digits() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of 1,437 training and 360 validation images, with values in [0, 1]."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError("optkit demo needs scikit-learn for its data: pip install scikit-learn.") from error
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=360, stratify=labels, random_state=SEED)
    train_x, val_x = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for part in split[:2])
    train_y, val_y = (torch.tensor(part) for part in split[2:])
    shuffled = torch.Generator().manual_seed(SEED)
    train = DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True, generator=shuffled)
    return train, DataLoader(TensorDataset(val_x, val_y), batch_size=360)


# --- the stopwatch ---


class Stopwatch:
    """Times steps from outside, equally for both runs: two callbacks of it stand around the one that averages.

    tail = from the end of the backward pass to the end of `optimizer.step` (Lightning clips in between), plus what the
    averaging callback does at the end of the batch. step = from the start of a batch to the end of the averaging. Both
    in processor time: on one thread that is the wall time of an idle machine, whatever else this one is doing.
    """

    def __init__(self) -> None:
        self.tails: list[float] = []  # milliseconds
        self.steps: list[float] = []
        self.backward_ended = self.step_ended = self.averaging_started = self.batch_started = 0.0
        self.plan: GroupPlan | None = None  # of the one-pass step, if there is one

    def median_ms(self) -> dict[str, float]:
        """The median of each time, in milliseconds, without the first tenth of the run."""
        skip = len(self.steps) // 10  # while allocators and caches warm up
        return {"optimizer tail": median(self.tails[skip:]), "training step": median(self.steps[skip:])}


class _Before(Callback):
    """The half of the stopwatch that stands in front of the averaging callback."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(self.after_step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, OnePassOptimizer):
            self.watch.plan = optimizer.explain().groups[0]

    def on_train_batch_start(self, *args: Any) -> None:
        self.watch.batch_started = time.process_time()

    def on_after_backward(self, *args: Any) -> None:
        self.watch.backward_ended = time.process_time()

    def after_step(self, *args: Any) -> None:
        self.watch.step_ended = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.watch.averaging_started = time.process_time()


class _After(Callback):
    """The half that stands behind it."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_batch_end(self, *args: Any) -> None:
        watch, now = self.watch, time.process_time()
        watch.tails.append(1e3 * (watch.step_ended - watch.backward_ended + now - watch.averaging_started))
        watch.steps.append(1e3 * (now - watch.batch_started))


# --- the two runs ---


def train(name: str, extra: list[Callback], averaging: Callback, max_epochs: int) -> tuple[RunRecord, GroupPlan | None]:
    """One fit from the same seed; returns its record, and the plan of its one-pass step if it had one."""
    pl.seed_everything(SEED, verbose=False)
    watch, report = Stopwatch(), Report(name=name, write=False, verbose=False)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        deterministic=True,
        gradient_clip_val=1.0,
        callbacks=[*extra, report, _Before(watch), averaging, _After(watch)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(DigitClassifier(), *digits())
    report.record.timings = watch.median_ms()
    return report.record, watch.plan


def show(console: Console, runs: list[RunRecord], plan: GroupPlan) -> None:
    """Prints the results of both runs side by side."""
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("", *(run.name for run in runs)):
        table.add_column(head, overflow="fold")
    for row in result_rows(runs):
        table.add_row(*row)
    table.add_row("after the backward pass", "clip, step, average", "one pass")
    console.print(table)
    console.print("Tail: clip, step and average. Times are processor time, on one thread.")
    console.print("The one pass:", " > ".join(plan.stages))
    console.print(f"{plan.path}; {plan.num_tensors} tensors, {plan.num_elements:,} parameters")


def add_options(parser: ArgumentParser) -> None:
    """`--fast` needs no value."""
    parser.add_argument("--fast", action="store_true", help="3 epochs instead of 15")
    parser.add_argument("--report", type=str, default="reports/demo.html", help="the HTML file to write")


def demo(options: Namespace) -> None:
    """Trains a small network on real images, plain and fused, and writes a report with pictures.

    The numbers are the same, the time after the backward pass is not. A quarter of a minute.

    Raises:
        ValueError: without scikit-learn, and for a report that cannot be written.
    """
    if reason := why_unwritable(Path(options.report)):
        raise ValueError(f"optkit demo: --report {options.report}: {reason}.")
    digits()  # without its package nothing has been changed yet
    for name in LIGHTNINGS_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)  # the model is small: a second thread would mostly wait
    max_epochs = 3 if options.fast else 15

    console = Console(highlight=False, markup=False)
    console.rule("1 of 2: Lightning alone: AdamW, gradient_clip_val, EMAWeightAveraging")
    plain, _ = train("Lightning alone", [], EMAWeightAveraging(decay=EMA_DECAY), max_epochs)
    console.rule("2 of 2: the same with Fuse() and WeightAveraging(EMA(...))")
    fused, plan = train("with Fuse", [Fuse(verbose=False)], WeightAveraging(EMA(EMA_DECAY)), max_epochs)
    assert plan is not None

    show(console, [plain, fused], plan)
    path = write_report([plain, fused], Path(options.report), title="Digits: Lightning alone, and with Fuse")
    print(f"Report: {path}")
