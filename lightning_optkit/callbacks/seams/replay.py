# SPDX-License-Identifier: Apache-2.0
"""Runs `training_step` once more on a batch without a trace: for measurements only."""

from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_optkit.callbacks.seams.state_of_step import without_effect

__all__ = ["replayed_loss"]


def replayed_loss(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor | None:
    """The loss of the class's own `training_step`, without gradients and without what callbacks add to it.

    All that it may change in module, batch and Trainer is then as before. None if it returns none, or fails: it may
    need what only a Trainer's own call gives it.
    """
    step = MethodType(type(pl_module).training_step, pl_module)  # that of the instance SAM and others override
    with without_effect(trainer, pl_module) as loss_for, torch.no_grad():
        try:
            return loss_for(step, batch, batch_idx)
        except Exception:
            return None
