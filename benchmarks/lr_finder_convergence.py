# SPDX-License-Identifier: Apache-2.0
"""How good the rates of `LRFinder` are: the loss after a short training at each suggestion, against a sweep.

For each task, 12 rates from 3e-5 to 3 are tried, and the suggestions of range tests with several seeds. A row has the
loss after training at a suggestion over the lowest loss of the sweep (1.1: a tenth worse), the worst of the seeds, and
the steps that each finder took. The rule "middle" was chosen on the tasks of CALIBRATION, "trained" on those of DESIGN
with the seeds 10 and 11; what was not in them was tried once, afterwards, with other seeds.

Usage: python benchmarks/lr_finder_convergence.py [--steps 200] [--seeds 3] [--first-seed 0]
           [--trial-steps 200] [--tasks NAME ...] [--save]
"""

import argparse
import inspect
import json
import logging
import math
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from harness import environment, progress, results_file
from precision_convergence import Transformer, chars, convolutional, diabetes, digits
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import LRFinder
from lightning_optkit.diagnostics.lr_range import RULES
from lightning_optkit.optimizers import SGD, Adagrad, Adam, AdamW, Lion, NAdam, RMSprop

FITTED = 1e-3  # a network with a lower loss has fitted all there is: a ratio would compare roundings
SWEEP = [10 ** (-4.5 + place * 5 / 11) for place in range(12)]


class Task(NamedTuple):
    """A data set, a network, a loss and an optimizer."""

    load: Callable[[], tuple[Tensor, Tensor]]
    build: Callable[[], nn.Module]
    loss_of: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]


class Recurrent(nn.Module):
    """A GRU of width 64 on characters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.gru, self.head = nn.Embedding(128, 64), nn.GRU(64, 64, batch_first=True), nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (batch, 128, length)."""
        return self.head(self.gru(self.tokens(x))[0]).transpose(1, 2)


def dense(inputs: int, outputs: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, outputs)
    )


def reconstruction() -> tuple[Tensor, Tensor]:
    images, _ = digits()
    return images, images.flatten(1)


def wine() -> tuple[Tensor, Tensor]:
    return standardized("load_wine")


def tumors() -> tuple[Tensor, Tensor]:
    return standardized("load_breast_cancer")


def standardized(name: str) -> tuple[Tensor, Tensor]:
    from sklearn import datasets

    data = getattr(datasets, name)()
    x = torch.tensor(data.data, dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0), torch.tensor(data.target)


def momentum(params: Any, lr: float) -> torch.optim.Optimizer:
    return SGD(params, lr=lr, momentum=0.9)


CALIBRATION = {
    "digits, dense, AdamW": Task(digits, lambda: dense(64, 10), cross_entropy, AdamW),
    "digits, convolutions, SGD with momentum": Task(digits, convolutional, cross_entropy, momentum),
    "digits, dense, SGD": Task(digits, lambda: dense(64, 10), cross_entropy, SGD),
    "diabetes, dense, Adam": Task(diabetes, lambda: dense(10, 1, nn.Tanh), mse_loss, Adam),
    "diabetes, dense, SGD with momentum": Task(diabetes, lambda: dense(10, 1, nn.Tanh), mse_loss, momentum),
    "characters, transformer, AdamW": Task(chars, Transformer, cross_entropy, AdamW),
    "digits, autoencoder, RMSprop": Task(reconstruction, lambda: dense(64, 64, nn.GELU), mse_loss, RMSprop),
    "digits, convolutions, Lion": Task(digits, convolutional, cross_entropy, Lion),
    "characters, GRU, Adam": Task(chars, Recurrent, cross_entropy, Adam),
}
HELD_OUT = {
    "wine, dense, NAdam": Task(wine, lambda: dense(13, 3), cross_entropy, NAdam),
    "tumors, dense, RMSprop": Task(tumors, lambda: dense(30, 2, nn.SiLU), cross_entropy, RMSprop),
    "characters, transformer, SGD with momentum": Task(chars, Transformer, cross_entropy, momentum),
    "diabetes, dense, Adagrad": Task(diabetes, lambda: dense(10, 1), mse_loss, Adagrad),
}
TASKS = {**CALIBRATION, **HELD_OUT}
DESIGN = (
    "digits, dense, AdamW", "digits, convolutions, SGD with momentum", "diabetes, dense, Adam",
    "characters, transformer, AdamW",
)  # fmt: skip
ALL = (*RULES, "trained")


class Module(pl.LightningModule):
    """The network of a task; `losses` has those of every step."""

    def __init__(self, task: Task, lr: float, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.task, self.lr = task.build(), task, lr
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of a batch."""
        loss = self.task.loss_of(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """That of the task."""
        return self.task.optimizer(self.parameters(), lr=self.lr)


def trained(task: Task, lr: float, steps: int, seed: int, *callbacks: pl.Callback) -> float:
    """The mean loss of the last tenth of a training, at least FITTED."""
    module = Module(task, lr, seed)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = pl.Trainer(**quiet, max_steps=steps, accelerator="cpu", callbacks=list(callbacks))
    batches = torch.Generator().manual_seed(seed)
    trainer.fit(module, DataLoader(TensorDataset(*task.load()), batch_size=32, shuffle=True, generator=batches))
    return max(statistics.fmean(module.losses[-max(steps // 10, 1) :]), FITTED)


def rows_of(name: str, steps: int, seeds: range, trial_steps: int) -> dict[str, Any]:
    """The best of the sweep, and per rule the worst ratio to it over the seeds, and the rates."""
    task, first = TASKS[name], seeds[0]
    sweep = {lr: trained(task, lr, steps, first) for lr in SWEEP}
    lowest = min(loss for loss in sweep.values() if math.isfinite(loss))
    best = next(lr for lr, loss in sweep.items() if loss == lowest)
    ratios: dict[str, list[float]] = {rule: [] for rule in ALL}
    rates: dict[str, list[float]] = {rule: [] for rule in ALL}
    costs = []
    for seed in seeds:
        finder = LRFinder(suggestion="trained", trial_steps=trial_steps, apply=False, verbose=False)
        trained(task, 1e-3, 1, seed, finder)
        assert finder.result is not None
        costs.append(sum(trial.steps for trial in finder.trials) + len(finder.result.lrs))
        for rule in ALL:
            lr = finder.result.suggestions.get(rule)
            rates[rule].append(math.nan if lr is None else lr)
            ratios[rule].append(math.inf if lr is None else trained(task, lr, steps, first) / lowest)
    facts = {"task": name, "held_out": name in HELD_OUT, "design": name in DESIGN, "seeds": [*seeds], "budget": steps}
    facts["trial_steps"] = trial_steps
    found = {"best_lr": best, "lowest_loss": lowest, "steps_of_finder": max(costs)}
    return {**facts, **found, **{rule: max(ratios[rule]) for rule in ALL}, "rates": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--trial-steps", type=int, default=200, help="of LRFinder")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--save", action="store_true", help="keep the rows under benchmarks/results/")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows, first = [], arguments.first_seed
    for name in progress(arguments.tasks):
        rows.append(rows_of(name, arguments.steps, range(first, first + arguments.seeds), arguments.trial_steps))
        print(json.dumps(rows[-1]), flush=True)
    table = Table(
        "task", "best rate", *ALL, "its steps", title=f"loss after {arguments.steps} steps / lowest of the sweep"
    )
    for row in rows:
        name = f"{row['task']}{' (design of trained)' if row['design'] else ''}"
        ratios = (f"{row[rule]:.2f}" for rule in ALL)
        table.add_row(name, f"{row['best_lr']:.2g}", *ratios, str(row["steps_of_finder"]))
    Console(file=sys.stderr, width=120).print(table)
    if arguments.save:
        facts = environment()
        with results_file("lr-finder", facts).open("a") as file:
            file.writelines(json.dumps({**facts, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
