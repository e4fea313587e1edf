# SPDX-License-Identifier: Apache-2.0
"""Sets the learning rates of a run: of each step of a trial, and those that it starts from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR

from lightning_optkit.callbacks.scheduling.existing_schedulers import schedulers_of
from lightning_optkit.callbacks.seams.lightning_private import accumulates
from lightning_optkit.callbacks.seams.schedules_of_run import base_rate

__all__ = ["StepsAtRates", "bases_of", "set_rates"]

_DIVERGED = 4.0  # times the fall so far, above the first losses


class StepsAtRates(pl.Callback):
    """Sets the rates of each step, and keeps the losses; stops the run when they diverge.

    Args:
        ratios: Of the rate of each parameter group to the largest.
        rates: The largest rate of each step.
    """

    def __init__(self, ratios: Sequence[float], rates: Sequence[float]) -> None:
        self._ratios, self._rates = ratios, rates
        self._window: list[Tensor] = []
        self.losses: list[float] = []
        self.reason = ""  # why the losses say nothing

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rate = self._rates[min(len(self.losses), len(self._rates) - 1)]
        self._written = [(group, rate * ratio) for group, ratio in zip(groups, self._ratios, strict=False)]
        for group, value in self._written:
            _write(group, "lr", value)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._window.append(loss.detach().float() * trainer.accumulate_grad_batches)  # divided by it for backward
        if accumulates(trainer) or not self._window:
            return
        if not all(math.isclose(float(group["lr"]), value, rel_tol=1e-5) for group, value in self._written):
            self.reason = f"{type(pl_module).__name__} sets the rate in each step itself"
            trainer.should_stop = True
            return
        mean = torch.stack(self._window).mean()
        self._window = []
        self.losses.append(float(trainer.strategy.reduce(mean, reduce_op="mean")))
        trainer.should_stop = trainer.strategy.broadcast(self._has_diverged())

    def _has_diverged(self) -> bool:
        if not math.isfinite(self.losses[-1]):
            return True
        several = max(len(self._rates) // 20, 3)
        first, last = (sum(losses) / several for losses in (self.losses[:several], self.losses[-several:]))
        return len(self.losses) > 2 * several and last > first + _DIVERGED * max(
            first - min(self.losses), abs(first) / 4
        )


def bases_of(trainer: pl.Trainer) -> list[float]:
    """The rate of each group that its schedule multiplies; of OneCycleLR and CyclicLR, the largest.

    The present rate is already that of the first step, which a schedule may begin at 0.
    """
    tops = {
        id(group): float(top)
        for scheduler in schedulers_of(trainer)
        if isinstance(scheduler, CyclicLR)
        for group, top in zip(scheduler.optimizer.param_groups, scheduler.max_lrs, strict=False)
    }
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [tops.get(id(group), base_rate(group)) for group in groups]


def set_rates(trainer: pl.Trainer, rate: float, before: float) -> None:
    """Scales the rates of all groups, and those that schedulers start from, so that `before` becomes `rate`."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr", "decay_lr"):
                if name in group:
                    _write(group, name, rate * (float(group[name]) / before))
    for scheduler in schedulers_of(trainer):
        for name in ("base_lrs", "max_lrs"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, [rate * (float(value) / before) for value in getattr(scheduler, name)])


def _write(group: dict[str, Any], name: str, value: float) -> None:
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value
