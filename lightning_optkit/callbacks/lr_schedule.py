# SPDX-License-Identifier: Apache-2.0
"""Schedules the learning rate of an unchanged LightningModule."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateFinder

from lightning_optkit._checks import check_bools
from lightning_optkit.callbacks.scheduling.clock import Interval
from lightning_optkit.callbacks.scheduling.existing_schedulers import (
    base_on_largest,
    refuse_other_schedules,
    take_over_schedulers,
)
from lightning_optkit.callbacks.scheduling.group_targets import group_targets
from lightning_optkit.callbacks.scheduling.scheduled_callback import ScheduledCallback
from lightning_optkit.callbacks.scheduling.target import Target
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.schedules import Schedule

__all__ = ["LRSchedule"]


class LRSchedule(ScheduledCallback):
    """Multiplies the learning rate of every group of every optimizer by a schedule, counted in optimizer steps.

    Each group has its own base value, its initial learning rate, including groups added during the run. It is stored in
    the group as `initial_lr`, torch's name. Learning rates that are tensors are changed in place. LearningRateMonitor
    logs them as usual. What else writes a rate (`BackboneFinetuning`, a hook) is overwritten at the next step, with a
    warning, except for rates that are tensors.

    The length of the run is determined when the training starts, so it grows with `max_epochs` when a run is resumed,
    and again at the start of each epoch: future epochs are assumed to be as long as the current one. Of `max_epochs`
    and `max_steps` the earlier end counts; `max_time` is unknown in steps, so a run that it stops ends in the middle of
    the schedule. A step that a loss scaler skips counts, as in `trainer.global_step`: the schedule ends with the run.
    With manual optimization every batch counts as one step of each optimizer. With `fast_dev_run` a schedule that does
    not fit into those few steps is ignored.

    Args:
        schedule: The factor as a function of progress; a float length in it is a fraction of the run.
        interval: Unit of integer lengths: "step", "epoch" (the factor changes between epochs, like Lightning's
            schedulers of this interval), "fractional_epoch" (it changes with every step), "sample" or "token" (counted
            over all ranks; costs one small reduction per step).
        total: Length of the run in that unit, at least 1. Default: derived from the Trainer, except for tokens.
        count: Returns the samples or tokens of a batch. Default: its size; there is no default for tokens.
        replace_schedulers: Take the place of schedulers of `configure_optimizers` until the fit ends. False: raise if
            there are any. Of OneCycleLR, which has overwritten the optimizer's own rate and momentum, the largest rate
            becomes the base, and the momentum stays; CyclicLR raises. With manual optimization the module may go on
            calling their `step`, which does nothing until then.
        verbose: Print schedule, length and base values when training starts.

    Raises:
        ValueError: for an argument out of range; when the fit starts, with another schedule of the learning rate that
            cannot be replaced, and if the schedule needs an unknown length of the run, or is longer than the run.

    Example:
        >>> from lightning_optkit.schedules import warmup_cosine
        >>> trainer = pl.Trainer(callbacks=[LRSchedule(warmup_cosine(warmup=0.05))], logger=False)
    """

    name = "lr"

    def __init__(
        self,
        schedule: Schedule,
        interval: Interval = "step",
        *,
        total: int | None = None,
        count: Callable[[Any], int] | None = None,
        replace_schedulers: bool = True,
        verbose: bool = True,
    ) -> None:
        check_bools(self._owner, replace_schedulers=replace_schedulers)
        super().__init__(schedule, interval, total, count, verbose)
        self._replace_schedulers = replace_schedulers
        self._rates_at_start: list[float] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            refuse_other_schedules(self._owner, trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        replaces = self._replace_schedulers
        self._at_end(take_over_schedulers(self._owner, trainer, pl_module, replaces, self._verbose))
        super().on_fit_start(trainer, pl_module)
        self._rates_at_start = [float(group["lr"]) for group in self._groups(trainer)]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not Run(trainer).is_resuming:
            has_found = any(finder.optimal_lr for finder in callbacks_of(trainer, LearningRateFinder))
            for group, before in zip(self._groups(trainer), self._rates_at_start, strict=False):
                if float(group["lr"]) != before:  # a finder has changed it
                    group["initial_lr"] = float(group["lr"])
                    if {"max_lr", "min_lr"} <= group.keys():  # of OneCycleLR, which a checkpoint keeps
                        group["max_lr"] = float(group["lr"])
                if has_found and "decay_lr" in group:
                    group["decay_lr"] = float(group["lr"])
        else:  # perhaps of a run in which OneCycleLR was the schedule
            base_on_largest(self._groups(trainer))
        super().on_train_start(trainer, pl_module)

    @staticmethod
    def _groups(trainer: pl.Trainer) -> list[dict[str, Any]]:
        return [group for optimizer in trainer.optimizers for group in optimizer.param_groups if "lr" in group]

    def _targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Target]:
        return group_targets(trainer.optimizers, "lr", None)
