# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on an exception that the other processes may not have."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_optkit._torch_private import default_store
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.lightning_packages import is_a

__all__ = ["SECONDS_FOR_OTHERS", "failed_alike", "wait_for_nobody"]

SECONDS_FOR_OTHERS = 10.0


def failed_alike(trainer: pl.Trainer, exception: BaseException) -> bool:
    """Whether every process has failed at the same place of the code and the run, within these seconds.

    Asked by way of the store where processes meet, since a collective may be in progress. One that fails since another
    has done so, at another place, does not wait for it again.
    """
    if not isinstance(exception, Exception):  # Ctrl-C comes to each somewhere else
        return False
    frames = traceback.extract_tb(exception.__traceback__)
    lines = [(frame.filename, frame.lineno) for frame in frames]
    of_run = trainer.current_epoch, trainer.global_step, trainer.fit_loop.batch_idx
    place = str((type(exception).__name__, of_run, lines))
    try:
        store = default_store()
        failures = store.add(f"lightning_optkit/failures/{trainer.global_rank}", 1)  # an earlier one is no answer
        keys = [f"lightning_optkit/failed/{failures}/{rank}" for rank in range(trainer.world_size)]
        store.set(keys[trainer.global_rank], place)
        store.wait(keys, timedelta(seconds=SECONDS_FOR_OTHERS))
        return all(store.get(key) == place.encode() for key in keys)
    except (RuntimeError, ValueError):  # the time is over, or the process that has the store is gone
        return False


def wait_for_nobody(trainer: pl.Trainer, override: Callable[[object, str, Callable[..., object]], None]) -> None:
    """Has checkpoints of this process wait for no other one; with sharded weights, none is written."""
    override(trainer.strategy, "barrier", partial(_no_barrier))
    if is_a(trainer.strategy, ModelParallelStrategy):
        override(trainer, "save_checkpoint", partial(_save_nothing, trainer))


def _no_barrier(name: str | None = None) -> None:
    """The other processes may never reach it."""


def _save_nothing(trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
    paths = [
        path for each in callbacks_of(trainer, ModelCheckpoint) for path in (each.last_model_path, each.best_model_path)
    ]
    saved = max((path for path in paths if path and os.path.exists(path)), key=os.path.getmtime, default=None)
    rank_zero_warn(
        "ExactResume: no checkpoint is written on this exception, since not every process has it and each has only its "
        "part of the weights; "
        + (f"resume from {saved}." if saved else "give ModelCheckpoint(every_n_train_steps=...) to have one next time.")
    )
