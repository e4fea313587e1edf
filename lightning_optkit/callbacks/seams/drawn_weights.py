# SPDX-License-Identifier: Apache-2.0
"""The loss of a batch for weights that mean nothing: whether a loss of 0 is that of the run's weights, or of any."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_optkit.callbacks.seams.replay import replayed_loss
from lightning_optkit.callbacks.seams.run import Run

__all__ = ["loss_of_drawn_weights"]

_DRAWS = 3  # a small batch may be right by chance


def loss_of_drawn_weights(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: tuple[Any, int]) -> float:
    """The largest loss for weights of 0, and for some drawn at random; everything is then as before.

    NaN if `training_step` cannot be run again.
    """
    generator = torch.Generator().manual_seed(0)
    before = {p: p.detach().clone() for p in dict.fromkeys(Run(trainer).parameters)}
    losses = []
    try:
        for draw in range(1 + _DRAWS):
            for p in before:
                p.data.copy_(_drawn(p, generator) if draw else torch.zeros_like(p))
            loss = replayed_loss(trainer, pl_module, *batch)
            if loss is None:
                return math.nan
            losses.append(float(loss))
    finally:
        for p, value in before.items():
            p.data.copy_(value)
    return max(losses, key=abs)


def _drawn(p: Tensor, generator: torch.Generator) -> Tensor:
    """Normal, of about the size of initial weights."""
    width = max(p[0].numel(), 1) if p.dim() > 1 else 1
    return torch.randn(p.shape, generator=generator).to(p) / math.sqrt(width)
