# SPDX-License-Identifier: Apache-2.0
"""The step of torch's ReduceLROnPlateau that follows an epoch at whose end a checkpoint is saved.

Lightning takes it after the hooks in which checkpoints are saved, and not at all when it resumes from one of them.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_optkit.callbacks.seams.lightning_private import (
    batch_progress,
    epoch_progress,
    last_metrics,
    scheduler_progress,
)

__all__ = ["steps_due", "take_steps"]


def steps_due(trainer: pl.Trainer, computes: bool) -> list[dict[str, Any]]:
    """The number of each scheduler that is due, with the value of its metric, None if that is unknown.

    Args:
        trainer: The Trainer, at the time of the save.
        computes: Whether metrics may be computed: all processes take part in that.
    """
    if not trainer.lightning_module.automatic_optimization or not _waits_for_schedulers(trainer):
        return []
    due = [
        (number, config)
        for number, config in enumerate(trainer.lr_scheduler_configs)
        if config.reduce_on_plateau
        and config.interval == "epoch"
        and (trainer.current_epoch + 1) % config.frequency == 0
    ]
    if not due:
        return []
    metrics = trainer.callback_metrics if computes else last_metrics(trainer)
    values = [(number, config, metrics.get(str(config.monitor))) for number, config in due]
    return [
        {
            "number": number,
            "monitor": config.monitor,
            "value": None if value is None else torch.as_tensor(value).detach().cpu(),
        }
        for number, config, value in values
    ]


def take_steps(trainer: pl.Trainer, due: list[dict[str, Any]]) -> None:
    """Takes the steps that were due."""
    configs = trainer.lr_scheduler_configs
    for each in due:
        number, value = each["number"], each["value"]
        if number >= len(configs) or not configs[number].reduce_on_plateau:
            continue
        if value is None:
            rank_zero_warn(
                f"ExactResume: the checkpoint was saved before {each['monitor']!r} was logged, so ReduceLROnPlateau "
                "misses the step of that epoch; save by a ModelCheckpoint, whose turn comes after the module's."
            )
            continue
        progress = scheduler_progress(trainer)
        progress.increment_ready()
        trainer.lightning_module.lr_scheduler_step(configs[number].scheduler, value.to(trainer.strategy.root_device))
        progress.increment_completed()


def _waits_for_schedulers(trainer: pl.Trainer) -> bool:
    """Whether a whole epoch's last hooks are running, before the ReduceLROnPlateau step that follows it."""
    epochs, batches = epoch_progress(trainer).current, batch_progress(trainer)
    is_whole = batches.is_last_batch or batches.current.ready == trainer.num_training_batches
    return bool(is_whole and epochs.processed == epochs.completed + 1)
