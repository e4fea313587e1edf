# SPDX-License-Identifier: Apache-2.0
"""The training loss of each optimizer step, however Lightning passes it on, read from a device only when asked for."""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_optkit.diagnostics._observations import Losses

__all__ = ["LossesOfRun"]

_MOST_PENDING = 1_024  # losses that are on a device, which takes room of its own for each


class LossesOfRun:
    """The mean of the losses of the batches that were accumulated for a step.

    With several optimizers that the module steps itself, no loss is that of the run, and none is taken.
    """

    def __init__(self) -> None:
        self.losses = Losses()
        self._window: list[Tensor | float] = []
        self._pending: list[Tensor] = []
        self._num_steps = self._num_asked = 0
        self._of_batch: Tensor | float = math.nan

    def after_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, num_steps: int) -> None:
        """Takes the loss of a batch; `num_steps` tells whether a step was taken since the last one."""
        is_automatic, self._of_batch = pl_module.automatic_optimization, math.nan
        if not is_automatic and len(trainer.optimizers) > 1:
            return
        # Lightning's is a dict, as a rule; to ask for a Mapping takes more than all of this.
        loss = outputs.get("loss") if isinstance(outputs, (dict, Mapping)) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:  # a module that steps itself may return anything
            factor = trainer.accumulate_grad_batches if is_automatic else 1  # by which Lightning has divided it
            # What is read later must be ours: others may write to theirs until then.
            self._of_batch = loss.item() * factor if loss.is_cpu else loss.detach().reshape(()) * factor
            self._window.append(self._of_batch)
        if num_steps > self._num_steps and self._window:
            mean = self._window[0] if len(self._window) == 1 else sum(self._window) / len(self._window)
            self._window = []
            if isinstance(mean, Tensor):
                self._pending.append(mean)
                if len(self._pending) >= _MOST_PENDING:
                    self.fetch()
            else:
                self.losses.append(mean)
        self._num_steps = num_steps

    def of_batch(self) -> float:
        """That of the last batch, NaN if it is not known; it reads from the device."""
        return float(self._of_batch)

    def fetch(self) -> None:
        """Reads what is still on a device, by one transfer."""
        if self._pending:
            for value in torch.stack([each.float() for each in self._pending]).tolist():
                self.losses.append(value)
        self._pending = []

    def since_last_asked(self) -> float:
        """The mean of the losses since this was called last, of 2,048 at most; NaN if there are none."""
        self.fetch()
        latest = self.losses.last(self.losses.num - self._num_asked)
        self._num_asked = self.losses.num
        return sum(latest) / len(latest) if latest else math.nan
