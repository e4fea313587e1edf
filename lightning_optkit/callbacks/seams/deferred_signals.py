# SPDX-License-Identifier: Apache-2.0
"""Has all processes of a run act on a signal at the same place, before the next batch.

Lightning's handler of SIGTERM sends a message to the other processes in the middle of theirs, and only that of the
first one counts; its handler of SLURM's signal saves a checkpoint in the middle of a step. Both may wait for ever.
"""

import signal
from collections.abc import Callable
from functools import partial
from types import FrameType

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_optkit.callbacks.seams.lightning_private import (
    ASK_FIRST_PROCESS,
    ON_REQUEUE,
    ON_SIGTERM,
    signals_of,
    stop_by_sigterm,
)

__all__ = ["DeferredSignals"]

Override = Callable[[object, str, Callable[..., object]], None]


class DeferredSignals:
    """Remembers the signals of this process until `act`, which every process calls before each batch.

    Args:
        trainer: The Trainer, before it registers its handlers.
        override: Replaces a method of an instance until the fit ends.
    """

    def __init__(self, trainer: pl.Trainer, override: Override) -> None:
        self._trainer, self._stops, self._requeues = trainer, False, False
        self._requeue: Callable[[int, FrameType | None], None] = getattr(signals_of(trainer), ON_REQUEUE)
        override(signals_of(trainer), ON_SIGTERM, partial(self._on_sigterm))
        override(signals_of(trainer), ON_REQUEUE, partial(self._on_requeue))
        override(trainer.fit_loop.epoch_loop, ASK_FIRST_PROCESS, partial(_ask_nobody))

    def act(self) -> None:
        """Saves and requeues if any process was told to.

        Raises:
            SIGTERMException: if any process was told to stop.
        """
        told = torch.tensor([self._stops, self._requeues], dtype=torch.int32)
        if self._trainer.world_size > 1 and torch.distributed.is_initialized():
            told = told.to(self._trainer.strategy.root_device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        stops, requeues = told.tolist()
        if requeues:
            self._requeues = False
            self._requeue(signal.SIGUSR1, None)
        if stops:
            stop_by_sigterm(self._trainer)
            raise SIGTERMException

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None and not self._stops:
            launcher.kill(signal.Signals(signum))  # sends it to the processes that this one has started
        if not self._stops:  # the process ends without a word, and with status 0, as without this callback
            rank_zero_info("ExactResume: SIGTERM; the run stops before its next batch, and goes on by ckpt_path=...")
        self._stops = True
        if self._trainer.world_size == 1:
            stop_by_sigterm(self._trainer)  # Lightning also looks between the batches of a validation

    def _on_requeue(self, signum: int, frame: FrameType | None) -> None:
        self._requeues = True


def _ask_nobody() -> None:
    """In place of Lightning's message of the first process to all, before each batch: `act` sends one from each."""
