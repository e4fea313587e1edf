# SPDX-License-Identifier: Apache-2.0
"""When loaders were last made, from which `reload_dataloaders_every_n_epochs` counts; Lightning does not save it."""

from typing import Any

import lightning.pytorch as pl

from lightning_optkit.callbacks.seams.lightning_private import LAST_RELOADS, validation_of

__all__ = ["keep_reload_of_validation", "reload_epochs", "set_reload_epochs"]


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
