# SPDX-License-Identifier: Apache-2.0
"""The loss of a batch for weights that are all 0: whether a loss of 0 is that of these weights, or of any."""

from typing import Any

import lightning.pytorch as pl

from lightning_optkit.callbacks.seams.replay import replayed_loss
from lightning_optkit.callbacks.seams.run import Run

__all__ = ["loss_without_weights"]


def loss_without_weights(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: tuple[Any, int]) -> float:
    """One forward pass, after which everything is as before; NaN if `training_step` cannot be run again."""
    before = {p: p.detach().clone() for p in dict.fromkeys(Run(trainer).parameters)}
    try:
        for p in before:
            p.data.zero_()
        loss = replayed_loss(trainer, pl_module, *batch)
        return float("nan") if loss is None else float(loss)
    finally:
        for p, value in before.items():
            p.data.copy_(value)
