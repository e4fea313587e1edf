# SPDX-License-Identifier: Apache-2.0
"""The current facts of a run, read from the Trainer at each use, since Lightning lets all of them change.

Optimizers are switched, groups are added, loaders are reloaded, finders fit and restore. Nothing here sets up data:
lengths are known from `on_train_start` on. Reading them earlier would create the loaders before a checkpoint restores
their position.
"""

import math
from collections.abc import Sized
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader

from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.lightning_private import batch_progress, epoch_progress
from lightning_optkit.clipping import ClipNorm, ClipValue

__all__ = ["Run", "has_lazy_parameters"]

_OF_FINDERS = (".lr_find_", ".scale_batch_size_")  # names of the checkpoints of Lightning's finders


class Run:
    """The run of `trainer`; created where it is needed, and not stored.

    Steps are those of `trainer.global_step`, which is in every checkpoint, so a resumed run needs no other state. With
    manual optimization Lightning adds the steps of all optimizers, so there a step is a batch.

    Args:
        trainer: The Trainer, during a fit.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._is_automatic = trainer.lightning_module.automatic_optimization

    @property
    def is_trial(self) -> bool:
        """Whether it ends before a schedule can run its course: `fast_dev_run`, or no epochs or steps at all."""
        trainer: Any = self._trainer
        return bool(trainer.fast_dev_run) or trainer.max_epochs == 0 or trainer.max_steps == 0

    # --- optimizers ---

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that currently step."""
        return [optimizer for optimizer in self._trainer.optimizers if isinstance(optimizer, Optimizer)]

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of all their groups."""
        return [param for optimizer in self.optimizers for group in optimizer.param_groups for param in group["params"]]

    @property
    def clip(self) -> ClipNorm | ClipValue | None:
        """The clip of `Trainer(gradient_clip_val=..., gradient_clip_algorithm=...)`; 0 and less is no clipping."""
        value = float(self._trainer.gradient_clip_val or 0)
        if value <= 0:
            return None
        return ClipValue(value) if self._trainer.gradient_clip_algorithm == "value" else ClipNorm(value)

    # --- resuming ---

    @property
    def is_resuming(self) -> bool:
        """Whether the user passed a checkpoint; Lightning's finders also restore through one."""
        path = self._trainer.ckpt_path
        return path is not None and not Path(path).name.startswith(_OF_FINDERS)

    # --- position and length ---

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self._trainer.global_step if self._is_automatic else int(self._batches.total.processed)

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return int(epoch_progress(self._trainer).current.processed)

    @property
    def window(self) -> int:
        """Batches per step of the epoch number `epoch`.

        The Trainer's value is that of another epoch until a GradientAccumulationScheduler's hook of the epoch's start,
        which Lightning doesn't call where a run is resumed within the epoch.
        """
        if not self._is_automatic:
            return 1
        schedule = self.accumulation_schedule
        if schedule is None:
            return self._trainer.accumulate_grad_batches
        return int(schedule.get_accumulate_grad_batches(self.epoch))

    @property
    def steps_in_epoch(self) -> float:
        """Steps of the current epoch; infinite if the loader has no length."""
        batches = self._trainer.num_training_batches
        return batches if math.isinf(batches) else math.ceil(batches / self.window)

    @property
    def step_in_epoch(self) -> int:
        """Completed steps of epoch number `epoch`, which is counted after its last validation only: then it is 0."""
        epoch, batches = epoch_progress(self._trainer).current, int(self._batches.current.processed)
        if batches < self._trainer.num_training_batches:
            return batches // self.window
        return math.ceil(batches / self.window) if epoch.started > epoch.processed else 0

    @property
    def samples_in_epoch(self) -> int | None:
        """Samples of the current epoch, over all ranks; None unless known from a sampler and a batch size."""
        loader = self._trainer.train_dataloader
        if not isinstance(loader, DataLoader) or type(loader.batch_sampler) is not BatchSampler:
            return None
        if loader.batch_size is None or not isinstance(loader.sampler, Sized):
            return None
        return min(len(loader.sampler), int(self._trainer.num_training_batches) * loader.batch_size) * self.replicas

    @property
    def replicas(self) -> int:
        """Number of ranks with different data: with tensor parallelism, several get the same batch."""
        arguments: dict[str, Any] = getattr(self._trainer.strategy, "distributed_sampler_kwargs", None) or {}
        return int(arguments.get("num_replicas", self._trainer.world_size))

    @property
    def accumulation_schedule(self) -> GradientAccumulationScheduler | None:
        """The callback that changes the number of accumulated batches, if any."""
        return next(iter(callbacks_of(self._trainer, GradientAccumulationScheduler)), None)

    @property
    def max_steps(self) -> int | None:
        """The limit of steps, or None."""
        if self._trainer.max_steps == -1:
            return None
        several = 1 if self._is_automatic else max(len(self._trainer.optimizers), 1)
        return math.ceil(self._trainer.max_steps / several)

    @property
    def max_epochs(self) -> int | None:
        """The limit of epochs, or None."""
        return None if self._trainer.max_epochs in (None, -1) else self._trainer.max_epochs

    def steps_at_end(self, before_epoch: int | None = None) -> int | None:
        """Steps at the end of the run, if future epochs are as long as this one; None if the end is unknown.

        `trainer.estimated_stepping_batches` assumes all epochs to be as long as the first, and supports neither
        GradientAccumulationScheduler nor data of unknown length (where it is -1).

        Args:
            before_epoch: Completed steps at the start of this epoch. Default: derived from the current position.
        """
        if self.max_epochs is None or math.isinf(self.steps_in_epoch):
            return self.max_steps
        before = self.step - self.step_in_epoch if before_epoch is None else before_epoch
        epochs = range(min(self.epoch, self.max_epochs), self.max_epochs)
        schedule, batches = self.accumulation_schedule, self._trainer.num_training_batches
        if schedule is None or not self._is_automatic:
            steps = before + int(self.steps_in_epoch) * len(epochs)
        else:
            steps = before + sum(math.ceil(batches / schedule.get_accumulate_grad_batches(e)) for e in epochs)
        steps = max(steps, self.step)  # it may have been stopped within an epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def steps_before(self, epoch: int) -> int | None:
        """Steps before epoch number `epoch`, from 0, if all epochs are as long as this one; None if that is unknown."""
        if math.isinf(self.steps_in_epoch):
            return None
        since = self.epoch if epoch >= self.epoch else 0
        schedule, batches = self.accumulation_schedule, self._trainer.num_training_batches
        if schedule is None or not self._is_automatic:
            steps = int(self.steps_in_epoch) * (epoch - since)
        else:
            steps = sum(math.ceil(batches / schedule.get_accumulate_grad_batches(e)) for e in range(since, epoch))
        return steps + (self.step - self.step_in_epoch if since else 0)

    @property
    def _batches(self) -> Any:
        return batch_progress(self._trainer)


def has_lazy_parameters(module: pl.LightningModule) -> bool:
    """Whether a layer still needs its first input to determine the shape of its parameters."""
    return any(is_lazy(param) for param in module.parameters())
