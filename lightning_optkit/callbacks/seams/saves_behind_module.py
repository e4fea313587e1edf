# SPDX-License-Identifier: Apache-2.0
"""Checkpoint callbacks save behind the module's own hook, whose work a run resumed from the file does not repeat.

Lightning calls all callbacks before the module, but at an epoch's end, where it calls those that monitor a metric last.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.lightning_packages import is_overridden

__all__ = ["save_behind_module"]

_HOOKS = ("on_train_batch_end", "on_validation_end")  # in which ModelCheckpoint saves before the module is called


def save_behind_module(trainer: pl.Trainer, pl_module: pl.LightningModule, override: Callable[..., None]) -> None:
    """Lets the checkpoint callbacks of the Trainer act after these hooks of the module, where it has one of its own.

    Args:
        trainer: The Trainer; called in `setup`.
        pl_module: Its module.
        override: Replaces a method for the rest of the fit.
    """
    for hook in _HOOKS:
        savers = [each for each in callbacks_of(trainer, Checkpoint) if is_overridden(hook, each)]
        if savers and is_overridden(hook, pl_module):
            _exchange(hook, savers, pl_module, override)


def _exchange(
    hook: str, savers: list[Checkpoint], pl_module: pl.LightningModule, override: Callable[..., None]
) -> None:
    # Functions, not partials: a copy of the module would copy the arguments of those.
    called: list[Callable[[], object]] = []
    of_module = getattr(pl_module, hook)

    def later(saves: Callable[..., object]) -> Callable[..., None]:
        def save(*args: Any, **kwargs: Any) -> None:
            called.append(lambda: saves(*args, **kwargs))

        return save

    def then_save(*args: Any, **kwargs: Any) -> object:
        waiting = called.copy()
        called.clear()  # also of a module that raises
        result = of_module(*args, **kwargs)
        for each in waiting:
            each()
        return result

    for saver in savers:
        override(saver, hook, later(getattr(saver, hook)))
    override(pl_module, hook, then_save)
