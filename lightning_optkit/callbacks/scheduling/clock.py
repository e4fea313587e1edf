# SPDX-License-Identifier: Apache-2.0
"""Where a run stands and how long it is, in the unit that a schedule counts in.

Steps are those of `trainer.global_step`, read and not counted here: that number is in every checkpoint, so a resumed
run needs nothing else, and it advances once per window of accumulated batches.
"""

import math
from collections.abc import Callable, Sized
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.data import extract_batch_size
from torch.utils.data import BatchSampler, DataLoader

from lightning_optkit._checks import check_callable, check_int, check_one_of
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of

__all__ = ["Clock", "Interval", "steps_in_run"]

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
        self._steps_per_epoch: float = 1
        self._step = 0

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the length of the run; the data are loaded by now."""
        self._steps_per_epoch = _steps_in_epoch(trainer, pl_module)
        self._step = _step_of(trainer, pl_module)
        if self.interval == "fractional_epoch" and (
            _accumulation_schedule(trainer) or math.isinf(self._steps_per_epoch)
        ):
            raise ValueError(
                f"{self.owner}(interval='fractional_epoch'): epochs must have a known and equal number of steps; "
                "use interval='epoch' with GradientAccumulationScheduler or data of unknown length."
            )
        self.total = self._given if self._given is not None else self._length(trainer, pl_module)

    def position(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        """What is behind the run now."""
        if self.interval in _COUNTED:
            return self.counted
        if self.interval == "epoch":
            return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        steps = _step_of(trainer, pl_module)
        return steps / self._steps_per_epoch if self.interval == "fractional_epoch" else steps

    def add(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Counts a batch; the count moves on with the optimizer, as a window of accumulated batches has one value."""
        if self.interval not in _COUNTED:
            return
        self.pending += int(self._count(batch))
        step = _step_of(trainer, pl_module)
        if step != self._step:
            self.counted += _over_all_ranks(trainer, self.pending)
            self.pending, self._step = 0, step

    def _length(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int | None:
        if self.interval == "token":
            return None
        steps = steps_in_run(trainer, pl_module)
        if self.interval == "step":
            return steps
        epochs: float | None = trainer.max_epochs if trainer.max_epochs != -1 else None
        if trainer.max_steps != -1 and steps is not None and not math.isinf(self._steps_per_epoch):
            epochs = min(math.inf if epochs is None else epochs, steps / self._steps_per_epoch)
        samples = _samples_in_epoch(trainer) if self.interval == "sample" else 1
        return None if epochs is None or samples is None else math.ceil(epochs * samples)

    def remedy(self, trainer: pl.Trainer) -> str:
        """What makes a length known that is not."""
        is_finite = not math.isinf(self._steps_per_epoch)
        follows_from_steps = {"step": True, "sample": _samples_in_epoch(trainer) is not None, "token": False}
        given = f"{self.owner}(total=...)"
        return f"Trainer(max_steps=...), or {given}" if follows_from_steps.get(self.interval, is_finite) else given

    def describe(self) -> str:
        """The length of the run in words."""
        unit = {"step": "optimizer step", "fractional_epoch": "epoch"}.get(self.interval, self.interval)
        return f"{self.total} {unit}{'s' * (self.total != 1)}"


def steps_in_run(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int | None:
    """Optimizer steps from the first epoch to the last; None if the run has no known end.

    `trainer.estimated_stepping_batches`, which knows neither GradientAccumulationScheduler nor data of unknown length
    (there it is -1). Under manual optimization, batches.
    """
    epochs, limit = trainer.max_epochs, trainer.max_steps if trainer.max_steps != -1 else None
    if limit is not None and not pl_module.automatic_optimization:
        limit = math.ceil(limit / max(len(trainer.optimizers), 1))  # Lightning counts the steps of all of them
    if epochs in (None, -1) or math.isinf(trainer.num_training_batches):
        return limit
    schedule = _accumulation_schedule(trainer)
    if schedule is None:
        steps = int(_steps_in_epoch(trainer, pl_module)) * epochs
    else:
        windows = (schedule.get_accumulate_grad_batches(epoch) for epoch in range(epochs))
        steps = sum(math.ceil(trainer.num_training_batches / window) for window in windows)
    return steps if limit is None else min(steps, limit)


def _step_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
    if pl_module.automatic_optimization:
        return trainer.global_step
    # Lightning then adds up the steps of all optimizers, however many each takes: count batches.
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


def _steps_in_epoch(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return batches
    return math.ceil(batches / (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1))


def _samples_in_epoch(trainer: pl.Trainer) -> int | None:
    """Over all ranks; None unless a sampler and a batch size tell."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or type(loader.batch_sampler) is not BatchSampler:
        return None
    if loader.batch_size is None or not isinstance(loader.sampler, Sized):
        return None
    return min(len(loader.sampler), int(trainer.num_training_batches) * loader.batch_size) * _replicas(trainer)


def _over_all_ranks(trainer: pl.Trainer, number: int) -> int:
    if trainer.world_size == 1:
        return number
    here = torch.tensor(number, device=trainer.strategy.root_device)
    everywhere: torch.Tensor = trainer.strategy.reduce(here, reduce_op="sum")
    return int(everywhere) * _replicas(trainer) // trainer.world_size


def _replicas(trainer: pl.Trainer) -> int:
    """Ranks with data of their own: with tensor parallelism, several see the same batch."""
    arguments: dict[str, Any] = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return int(arguments.get("num_replicas", trainer.world_size))


def _accumulation_schedule(trainer: pl.Trainer) -> GradientAccumulationScheduler | None:
    return next(iter(callbacks_of(trainer, GradientAccumulationScheduler)), None)
