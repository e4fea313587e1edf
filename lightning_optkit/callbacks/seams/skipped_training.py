# SPDX-License-Identifier: Apache-2.0
"""A fit with nothing left to train, as when a program whose run is finished is started again from its last checkpoint.

Lightning loads the checkpoint and returns: it calls neither `on_train_start` nor `on_train_end`.
"""

from collections.abc import Callable
from typing import Any, Protocol

import lightning.pytorch as pl

from lightning_optkit.callbacks.seams.lightning_private import BEFORE_TRAINING, TRAIN

__all__ = ["when_training_is_skipped"]


class _Override(Protocol):
    def __call__(self, owner: object, name: str, function: Callable[..., Any]) -> None: ...


def when_training_is_skipped(trainer: pl.Trainer, override: _Override, act: Callable[[], None]) -> None:
    """Calls `act()` where the training would have ended, with the data set up and everything still on its device.

    Args:
        trainer: The Trainer, before its loops run.
        override: Overrides a method until the fit ends, as `FitCallback._override`.
        act: What to do; it is not called by a run that trains.
    """
    loop = trainer.fit_loop
    begin, run = getattr(loop, BEFORE_TRAINING), getattr(loop, TRAIN)
    has_begun = False

    def begin_training() -> None:
        nonlocal has_begun
        has_begun = True
        begin()

    def run_loop() -> None:
        nonlocal has_begun
        has_begun = False  # the loop may have run before, for a finder
        run()
        if not has_begun:
            act()

    override(loop, BEFORE_TRAINING, begin_training)
    override(loop, TRAIN, run_loop)
