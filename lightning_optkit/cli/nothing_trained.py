# SPDX-License-Identifier: Apache-2.0
"""A fit without a step ends like one that trained: its checkpoint has reached its length, or there are no batches."""

from collections.abc import Sized
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import Report
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.lightning_private import batch_progress

__all__ = ["SaysNothingTrained", "why_without_batches"]


class SaysNothingTrained(pl.Callback):
    """Says so, and keeps a `Report` from showing the earlier run as this one; stands in front of it."""

    def __init__(self) -> None:
        self._has_trained = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A step is to come."""
        self._has_trained = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says it, if none came."""
        reached = _reached(trainer)
        if self._has_trained or not reached or trainer.ckpt_path is None:
            return
        reports = callbacks_of(trainer, Report)
        rank_zero_warn(
            f"Nothing was trained: the checkpoint has reached {reached} already; --trainer.{reached.partition('=')[0]} "
            f"can be larger.{' No report is written.' if reports else ''}"
        )
        for report in reports:
            report._write = report._verbose = False


def why_without_batches(trainer: pl.Trainer) -> str:
    """Of a fit that has ended: why it had none, in a few words; empty if it had, or was not to have any."""
    was_looked_for = trainer.num_training_batches == 0 or trainer.current_epoch > 0
    is_wanted = trainer.limit_train_batches != 0
    if batch_progress(trainer).total.ready or not was_looked_for or not is_wanted:
        return ""
    loader: Any = trainer.train_dataloader
    samples = len(loader.dataset) if isinstance(loader, DataLoader) and isinstance(loader.dataset, Sized) else 0
    if samples:
        return f"of {samples} samples of the training data there is no whole batch of {loader.batch_size} (drop_last)"
    return "the training data are empty"


def _reached(trainer: pl.Trainer) -> str:
    """The argument that has ended the fit; empty if none has."""
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return f"max_epochs={trainer.max_epochs}"
    return f"max_steps={trainer.max_steps}" if 0 <= trainer.max_steps <= trainer.global_step else ""
