# SPDX-License-Identifier: Apache-2.0
"""Where a run stands and how long it is, in the unit that a schedule counts in.

Steps are read and not counted here (`seams.run`), so a resumed run needs nothing else. The epochs to come are taken for
as long as the one that the run is in, which is looked at again when an epoch begins.
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
    """Position and total of a run.

    Args:
        owner: Callback to name in messages.
        interval: The unit.
        total: Length of the run in it; None: found by itself.
        count: Samples or tokens of one batch.
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
        self.counted = 0  # samples or tokens, on all ranks, in the windows of accumulated batches that are done
        self.pending = 0  # on this rank, in the window that is open
        self._given, self._count = total, count or extract_batch_size
        self._epoch = self._before = self._counted_before = 0  # where the epoch began, in each unit
        self._steps_per_epoch: float = 1
        self._step = 0

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the length of the run; the data are loaded by now."""
        run = Run(trainer)
        self._step = run.step
        if self.interval == "fractional_epoch" and (run.accumulation_schedule or math.isinf(run.steps_in_epoch)):
            raise ValueError(
                f"{self.owner}(interval='fractional_epoch'): epochs must have a known and equal number of steps; "
                "use interval='epoch' with GradientAccumulationScheduler or data of unknown length."
            )
        self.look_at_epoch(run, run.step_in_epoch)

    def look_at_epoch(self, run: Run, step_in_epoch: int = 0) -> None:
        """Finds the length of the run anew: the loader of the epoch that begins may have another length.

        Args:
            run: The run.
            step_in_epoch: Steps of the epoch that are behind it: a run may be resumed within one.
        """
        self._epoch, self._before, self._steps_per_epoch = run.epoch, run.step - step_in_epoch, run.steps_in_epoch
        samples = run.samples_in_epoch if self.interval == "sample" else None
        here = 0 if samples is None or not step_in_epoch else int(samples * step_in_epoch / run.steps_in_epoch)
        self._counted_before = self.counted - here
        self.total = self._given if self._given is not None else self._length(run)

    def position(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        """What is behind the run now."""
        if self.interval in _COUNTED:
            return self.counted
        run = Run(trainer)
        if self.interval == "epoch":
            return run.epoch
        if self.interval == "step":
            return run.step
        return self._epoch + (run.step - self._before) / self._steps_per_epoch

    def add(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Counts a batch; the count moves on with the optimizer, as a window of accumulated batches has one value."""
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
        """What makes a length known that is not."""
        is_finite = not math.isinf(self._steps_per_epoch)
        follows_from_steps = {"step": True, "sample": Run(trainer).samples_in_epoch is not None, "token": False}
        given = f"{self.owner}(total=...)"
        return f"Trainer(max_steps=...), or {given}" if follows_from_steps.get(self.interval, is_finite) else given

    def describe(self) -> str:
        """The length of the run in words."""
        unit = {"step": "optimizer step", "fractional_epoch": "epoch"}.get(self.interval, self.interval)
        return f"{self.total} {unit}{'s' * (self.total != 1)}"


def steps_in_run(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int | None:
    """Optimizer steps from the first epoch to the last; None if the run has no known end."""
    return Run(trainer).steps_at_end()


def over_all_ranks(trainer: pl.Trainer, number: int) -> int:
    """The sum of the numbers of all ranks that have data of their own."""
    if trainer.world_size == 1:
        return number
    here = torch.tensor(number, device=trainer.strategy.root_device)
    everywhere: torch.Tensor = trainer.strategy.reduce(here, reduce_op="sum")
    return int(everywhere) * Run(trainer).replicas // trainer.world_size
