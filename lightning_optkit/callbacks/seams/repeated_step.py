# SPDX-License-Identifier: Apache-2.0
"""Runs `training_step` again during a fit, on any batch, and leaves the run as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_optkit.callbacks.seams.copied_batch import copied_batch
from lightning_optkit.callbacks.seams.second_pass import SecondPass, finish_second_passes, loss_of

__all__ = ["repeatable", "repeated_loss"]


@contextmanager
def repeatable(pl_module: pl.LightningModule) -> Iterator[None]:
    """Inside, `repeated_loss` may be called at will, and gradients be taken with `torch.autograd.grad`.

    On exit, random numbers, buffers (running statistics), metrics and the module's own attributes are as before.
    Between two batches only: the buffers of another second pass would be restored too early.
    """
    with isolate_rng():
        second = SecondPass(pl_module)
        try:
            with second:
                yield
        finally:
            finish_second_passes(pl_module)


def repeated_loss(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor | None:
    """The loss of `training_step` for a copy of the batch, in the Trainer's precision; None if it returns none."""
    batch = copied_batch(batch)
    with trainer.precision_plugin.train_step_context():
        if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2):
            return loss_of(pl_module.training_step(batch, batch_idx))
        return loss_of(pl_module.training_step(batch))
