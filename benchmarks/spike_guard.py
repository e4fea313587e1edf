# SPDX-License-Identifier: Apache-2.0
"""What five injuries of a run leave behind, with and without `SpikeGuard`.

A small network is trained with a rate that falls by a cosine: undisturbed, injured, and injured under `SpikeGuard`. A
row has the loss on the whole training data at the end, over that of the undisturbed run of the same seed.

Usage: python benchmarks/spike_guard.py [--steps 800] [--seeds 10] [--first-seed 0] [--injuries NAME ...] [--save]
"""

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from harness import environment, progress, results_file
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from spike_families import Data, mlp, standardized
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import LRSchedule, SpikeGuard
from lightning_optkit.schedules import cosine

LR, WHEN = 3e-3, 0.6  # of the run


class Classifier(pl.LightningModule):
    """On digits with noisy labels, so that the loss does not fall to zero; `injury` changes one batch or loss."""

    def __init__(self, seed: int, injury: str, at: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.injury, self.at = mlp(64, 64, 64, 10), injury, at

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        x, y = batch
        now = self.global_step == self.at
        if now and self.injury == "inputs x 100":
            x = x * 100
        if now and self.injury == "random labels":
            y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
        loss = cross_entropy(self.net(x), y)
        return loss * float("nan") if now and self.injury == "NaN" else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), LR)


class Rates(pl.Callback):
    """Multiplies the rate of some steps, after `LRSchedule` has set it."""

    def __init__(self, steps: range, factor: float) -> None:
        self.steps, self.factor = steps, factor

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Sets it for this step alone: the schedule sets the next."""
        if trainer.global_step in self.steps:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] *= self.factor


INJURIES: dict[str, Callable[[int], list[pl.Callback]]] = {
    "NaN": lambda at: [],
    "inputs x 100": lambda at: [],
    "random labels": lambda at: [],
    "rate x 60, one step": lambda at: [Rates(range(at, at + 1), 60)],
    "rate x 20, 20 steps": lambda at: [Rates(range(at, at + 20), 20)],
}


def noisy_digits() -> Data:
    data, generator = load_digits(), torch.Generator().manual_seed(0)
    y = torch.tensor(data.target)
    wrong = torch.rand(len(y), generator=generator) < 0.1
    return standardized(data.data), torch.where(wrong, torch.randint(10, y.shape, generator=generator), y)


def train(seed: int, steps: int, injury: str, guarded: bool) -> tuple[float, SpikeGuard]:
    """The loss at the end, and the guard."""
    at, guard = int(WHEN * steps), SpikeGuard(verbose=False)
    module, data = Classifier(seed, injury, at), TensorDataset(*noisy_digits())
    callbacks = [LRSchedule(cosine()), *(INJURIES[injury](at) if injury else []), *([guard] if guarded else [])]
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True))
    with torch.no_grad():
        return float(cross_entropy(module.net(data.tensors[0]), data.tensors[1])), guard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--injuries", nargs="+", choices=["", *INJURIES], default=["", *INJURIES], metavar="NAME")
    parser.add_argument("--save", action="store_true", help="write the rows into benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    clean = {seed: train(seed, arguments.steps, "", False)[0] for seed in progress(seeds)}
    for injury, guarded in progress([(injury, guarded) for injury in arguments.injuries for guarded in (False, True)]):
        if not injury and not guarded:
            continue
        ends = [(seed, *train(seed, arguments.steps, injury, guarded)) for seed in seeds]
        ratios = [loss / clean[seed] for seed, loss, _ in ends]
        actions = [event.action for _, _, guard in ends for event in guard.events]
        row = {
            "benchmark": "spike_guard", "injury": injury or "none", "guarded": guarded, "seeds": len(ratios),
            "median": statistics.median(ratios), "worst": max(ratios),
            "within_2_percent": sum(ratio <= 1.02 for ratio in ratios),
            "mean_ratio": sum(loss for _, loss, _ in ends) / sum(clean.values()),
            "dropped": actions.count("skip"), "rollbacks": actions.count("rollback"), "stopped": actions.count("stop"),
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.save:
        facts = environment()
        with results_file("spike-guard", facts).open("a") as file:
            file.writelines(json.dumps({**facts, **vars(arguments), **row}) + "\n" for row in rows)
    table = Table("injury", "SpikeGuard", "loss / undisturbed: median", "worst", "within 2 %", "dropped", "rollbacks")
    for row in rows:
        table.add_row(
            row["injury"], "yes" if row["guarded"] else "no", f"{row['median']:.3f}", f"{row['worst']:.3f}",
            f"{row['within_2_percent']} of {row['seeds']}", str(row["dropped"]), str(row["rollbacks"]),
        )  # fmt: skip
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
