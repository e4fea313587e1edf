# SPDX-License-Identifier: Apache-2.0
"""When loaders were last made, from which `reload_dataloaders_every_n_epochs` counts, and the random state of then;
Lightning does not save it.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_optkit.callbacks.seams.lightning_private import (
    BEFORE_TRAINING,
    LAST_RELOADS,
    SET_UP_DATA,
    epoch_progress,
    train_loaders,
    validation_of,
)
from lightning_optkit.callbacks.seams.random_state import get_random_state, set_random_state

__all__ = ["Reloads", "keep_reload_of_validation", "reload_epochs", "set_reload_epochs"]


class Reloads:
    """Makes the loader of training, when a run goes on within a period, as in the epoch with which the period began.

    A program may give another loader in each epoch, or draw the samples of one.

    Args:
        trainer: The Trainer.
        stand_before: Puts a function before a method, which it receives first, until the fit ends.
    """

    def __init__(self, trainer: pl.Trainer, stand_before: Callable[[object, str, Callable[..., Any]], None]) -> None:
        self._trainer = trainer
        self.made: dict[str, Any] | None = None  # the random state before the loader was made
        self._epoch: int | None = None  # in which the run that goes on has made it
        stand_before(trainer.fit_loop, SET_UP_DATA, self._set_up)
        stand_before(trainer.fit_loop, BEFORE_TRAINING, self._begin)

    def go_on_from(self, saved: dict[str, Any]) -> None:
        """Called before the loader is made, with the state of ExactResume in the checkpoint."""
        ranks, rank = saved["ranks"], self._trainer.global_rank
        mine = ranks[rank] if len(ranks) == self._trainer.world_size else None
        if mine and mine.get("made"):  # of older versions no checkpoint has it
            self.made, self._epoch = mine["made"], int(saved["reloaded"][0])

    def _begin(self, on_run_start: Callable[[], None]) -> None:
        self._epoch = None  # from now on the loader is made in the epoch that it is for
        on_run_start()

    def _set_up(self, set_up: Callable[[], None]) -> None:
        untyped: Any = self._trainer  # Lightning does not declare the attribute
        if not untyped.reload_dataloaders_every_n_epochs:
            set_up()
            return
        device = self._trainer.strategy.root_device
        now, before = get_random_state([], device), train_loaders(self._trainer)
        if self._epoch is None or self.made is None:
            set_up()
            if train_loaders(self._trainer) is not before:
                self.made = now
            return
        progress = epoch_progress(self._trainer).current
        processed, completed = progress.processed, progress.completed
        progress.processed = progress.completed = self._epoch
        set_random_state(self.made, [], device)
        try:
            set_up()
        finally:
            progress.processed, progress.completed = processed, completed
            set_random_state(now, [], device)


def reload_epochs(trainer: pl.Trainer) -> list[float]:
    """The epochs in which the loaders of training and of validation were made; -inf before."""
    return [float(getattr(loop, name)) for loop, name in _places(trainer)]


def set_reload_epochs(trainer: pl.Trainer, epochs: list[float]) -> None:
    """Counts from these epochs, although the loaders were made when the run went on."""
    for (loop, name), epoch in zip(_places(trainer), epochs, strict=True):
        setattr(loop, name, epoch)


def keep_reload_of_validation(trainer: pl.Trainer, before: list[float]) -> None:
    """Counts from the epoch as before, where the loader of validation was made only since this process had none.

    Args:
        trainer: The Trainer, after a validation.
        before: What `reload_epochs` was before it.
    """
    training, _ = reload_epochs(trainer)
    untyped: Any = trainer  # Lightning does not declare the attribute
    if trainer.current_epoch - before[1] < untyped.reload_dataloaders_every_n_epochs:
        set_reload_epochs(trainer, [training, before[1]])


def _places(trainer: pl.Trainer) -> list[tuple[object, str]]:
    return list(zip((trainer.fit_loop, validation_of(trainer)[0]), LAST_RELOADS, strict=True))
