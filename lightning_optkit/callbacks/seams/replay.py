# SPDX-License-Identifier: Apache-2.0
"""Runs `training_step` once more on a batch without a trace: for measurements only."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_optkit.callbacks.seams.copied_batch import copied_batch
from lightning_optkit.callbacks.seams.second_pass import loss_of
from lightning_optkit.callbacks.seams.state_of_step import without_effect

__all__ = ["replayed_loss"]


def replayed_loss(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor | None:
    """The loss of the class's own `training_step`, without gradients and without what callbacks add to it.

    All that it may change in module, batch and Trainer is then as before. None if it returns none, or fails: it may
    need what only a Trainer's own call gives it.
    """
    step: Any = type(pl_module).training_step  # not that of the instance, which SAM and others override
    has_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    with without_effect(trainer, pl_module) as params, torch.no_grad():
        try:
            with trainer.precision_plugin.train_step_context(), params.watched():
                own = copied_batch(batch)
                return loss_of(step(pl_module, own, batch_idx) if has_index else step(pl_module, own))
        except Exception:
            return None
