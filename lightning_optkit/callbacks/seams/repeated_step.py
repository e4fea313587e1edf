# SPDX-License-Identifier: Apache-2.0
"""Runs `training_step` again during a fit, on any batch, and leaves the run as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_optkit.callbacks.seams.second_pass import finish_second_passes
from lightning_optkit.callbacks.seams.state_of_step import without_effect

__all__ = ["repeatable"]


@contextmanager
def repeatable(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Callable[[Any, int], Tensor | None]]:
    """Inside, what it yields may be called at will, and gradients be taken with `torch.autograd.grad`.

    On exit, all that `training_step` may change in module and Trainer is as before. Between two batches only: the
    buffers of another second pass would be restored too early.

    Yields:
        Maps a batch and its index to the loss of `training_step` for a copy of the batch, in the Trainer's precision;
        to None if it returns none.
    """
    with without_effect(trainer, pl_module) as loss_for:
        try:
            yield lambda batch, batch_idx: loss_for(pl_module.training_step, batch, batch_idx)
        finally:
            finish_second_passes(pl_module)  # of callbacks that run it twice themselves, as RDrop
