# SPDX-License-Identifier: Apache-2.0
"""Position and length of a run in the unit of a schedule.

Steps are read from the Trainer, not counted here (`seams.run`), so a resumed run needs no state. Future epochs are
assumed to be as long as the current one, which is measured at the start of each epoch.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.data import extract_batch_size

from lightning_optkit._checks import check_callable, check_int, check_one_of
from lightning_optkit.callbacks.seams.run import Run

__all__ = ["Clock", "Interval", "over_all_ranks", "steps_in_run"]

Interval: TypeAlias = Literal["step", "epoch", "fractional_epoch", "sample", "token"]

INTERVALS = ("step", "epoch", "fractional_epoch", "sample", "token")
_COUNTED = ("sample", "token")


class Clock:
    """Position and length of a run.

    Args:
        owner: Callback named in error messages.
        interval: The unit.
        total: Length of the run in that unit; None: derived from the Trainer.
        count: Returns the samples or tokens of one batch.
    """

    def __init__(self, owner: str, interval: str, total: int | None, count: Callable[[Any], int] | None) -> None:
        check_one_of(owner, "interval", interval, INTERVALS)
        if total is not None:
            check_int(owner, "total", total, minimum=1)
        if count is not None:
            check_callable(owner, "count", count, "count(batch)")
        if count is not None and interval not in _COUNTED:
            raise ValueError(f"{owner}(count=...): count needs interval='sample' or 'token', not {interval!r}.")
        if count is None and interval == "token":
            raise ValueError(f"{owner}(count=None): count must be a function from a batch to its number of tokens.")
        self.owner, self.interval, self.total = owner, interval, total
        self.counted = 0  # samples or tokens, on all ranks, in completed accumulation windows
        self.pending = 0  # on this rank, in the current window
        self._given, self._count = total, count or extract_batch_size
        self._epoch = self._before = self._counted_before = 0  # position at the start of the epoch, in each unit
        self._steps_per_epoch: float = 1
        self._step = 0

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Determines the length of the run; the data must be loaded."""
        run = Run(trainer)
        self._step = run.step
        if self.interval == "fractional_epoch" and (run.accumulation_schedule or math.isinf(run.steps_in_epoch)):
            raise ValueError(
                f"{self.owner}(interval='fractional_epoch'): epochs must have a known and equal number of steps; "
                "use interval='epoch' with GradientAccumulationScheduler or data of unknown length."
            )
        self.look_at_epoch(run, run.step_in_epoch)

    def look_at_epoch(self, run: Run, step_in_epoch: int = 0) -> None:
        """Determines the length of the run again, since the loader of the starting epoch may have another length.

        Args:
            run: The run.
            step_in_epoch: Number of completed steps of the epoch: a run may be resumed within one.
        """
        self._epoch, self._before, self._steps_per_epoch = run.epoch, run.step - step_in_epoch, run.steps_in_epoch
        samples = run.samples_in_epoch if self.interval == "sample" else None
        here = 0 if samples is None or not step_in_epoch else int(samples * step_in_epoch / run.steps_in_epoch)
        self._counted_before = self.counted - here
        self.total = self._given if self._given is not None else self._length(run)

    def position(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        """The current position of the run."""
        if self.interval in _COUNTED:
            return self.counted
        run = Run(trainer)
        if self.interval == "epoch":
            return run.epoch
        if self.interval == "step":
            return run.step
        return self._epoch + (run.step - self._before) / self._steps_per_epoch

    def add(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Counts a batch; the count advances with the optimizer, once per accumulation window."""
        if self.interval not in _COUNTED:
            return
        self.pending += int(self._count(batch))
        step = Run(trainer).step
        if step != self._step:
            self.counted += over_all_ranks(trainer, self.pending)
            self.pending, self._step = 0, step

    def _length(self, run: Run) -> int | None:
        if self.interval == "token":
            return None
        if self.interval == "step":
            return run.steps_at_end(self._before)
        epochs: float = math.inf if run.max_epochs is None else run.max_epochs
        if run.max_steps is not None and not math.isinf(self._steps_per_epoch):
            steps = run.steps_at_end(self._before)
            assert steps is not None
            epochs = min(epochs, self._epoch + (steps - self._before) / max(self._steps_per_epoch, 1))
        if math.isinf(epochs):
            return None
        if self.interval != "sample":
            return math.ceil(epochs)
        samples = run.samples_in_epoch
        return None if samples is None else math.ceil(self._counted_before + (epochs - self._epoch) * samples)

    def remedy(self, trainer: pl.Trainer) -> str:
        """How the user can make an unknown length known."""
        is_finite = not math.isinf(self._steps_per_epoch)
        follows_from_steps = {"step": True, "sample": Run(trainer).samples_in_epoch is not None, "token": False}
        given = f"{self.owner}(total=...)"
        return f"Trainer(max_steps=...), or {given}" if follows_from_steps.get(self.interval, is_finite) else given

    def describe(self) -> str:
        """The length of the run as text."""
        unit = {"step": "optimizer step", "fractional_epoch": "epoch"}.get(self.interval, self.interval)
        return f"{self.total} {unit}{'s' * (self.total != 1)}"


def steps_in_run(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int | None:
    """Optimizer steps of the whole run; None if its end is unknown."""
    return Run(trainer).steps_at_end()


def over_all_ranks(trainer: pl.Trainer, number: int) -> int:
    """The sum over all ranks that have different data."""
    if trainer.world_size == 1:
        return number
    here = torch.tensor(number, device=trainer.strategy.root_device)
    everywhere: torch.Tensor = trainer.strategy.reduce(here, reduce_op="sum")
    return int(everywhere) * Run(trainer).replicas // trainer.world_size
