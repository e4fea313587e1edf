# SPDX-License-Identifier: Apache-2.0
"""A resumed fit whose length its checkpoint has reached: it ends like one that trained."""

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.callbacks import Report
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of

__all__ = ["SaysNothingTrained"]


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


def _reached(trainer: pl.Trainer) -> str:
    """The argument that has ended the fit; empty if none has."""
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return f"max_epochs={trainer.max_epochs}"
    return f"max_steps={trainer.max_steps}" if 0 <= trainer.max_steps <= trainer.global_step else ""
