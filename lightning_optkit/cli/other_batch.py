# SPDX-License-Identifier: Apache-2.0
"""Whether the loss of a fit depends on its batch at all: exact, from that of another batch for the same weights."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_optkit.callbacks.seams.probe import can_probe
from lightning_optkit.callbacks.seams.replay import replayed_loss
from lightning_optkit.diagnostics.measure.batches import tensors_of
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["OtherBatch"]

_LOOKS = 5  # theory: heads of zeros begin with equal losses, but do not stay so
_VALUES = 3  # theory: a loss that is flat, at 0 or at a bound, is equal for any batch
_EXACT = (torch.float32, torch.float64)  # theory: in 16 bits two losses are often equal by rounding


class OtherBatch:
    """The other batch, and the losses of both as long as they are bitwise equal.

    Data that are nothing but numbers of samples, or the same in every batch, are no data: a module that makes its own
    has such a loader.
    """

    def __init__(self) -> None:
        self.batch: Any = None
        self._values: list[float] = []
        self._is_over, self._num_tensors = False, 0
        self.loss_beside_0 = math.nan  # that of the other batch, where that of the batch is 0 and it is not

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Compares the losses for the weights as they are; of no effect once they have differed."""
        if self._is_over or len(self._values) == _LOOKS:
            return
        if not self._values:
            self._is_over = self.batch is None or not can_probe(trainer, pl_module)
            if self._is_over:
                return
            self.batch = trainer.strategy.batch_to_device(self.batch)
            self._num_tensors = sum(1 for _ in tensors_of(batch))
            if not _are_data(batch, self.batch):
                self._is_over = True
                return
        own, other = (replayed_loss(trainer, pl_module, each, batch_idx) for each in (batch, self.batch))
        if own is not None and other is not None and not self._values and own == 0 and other != 0:
            self.loss_beside_0 = float(other)
        is_same = own is not None and other is not None and own.dtype in _EXACT and torch.equal(own, other)
        if own is None or not is_same or not math.isfinite(float(own)):
            self._is_over = True
        else:
            self._values.append(float(own))

    @property
    def is_sure(self) -> bool:
        """Whether the batch has inputs and targets; a single tensor may be there for the loader's sake."""
        return self._num_tensors > 1

    def verdict(self) -> Verdict | None:
        """That nothing of the batch is in the loss."""
        if self._is_over or len(self._values) < _LOOKS or len(set(self._values)) < _VALUES:
            return None
        cause = "the loss does not depend on the batch: it is that of the weights alone"
        evidence = (
            f"two batches that differ had the same loss to the last bit, for the weights after {_LOOKS} steps of the "
            f"fit, in which it went from {self._values[0]:.3g} to {self._values[-1]:.3g}"
        )
        remedy = "compute the loss that training_step returns from the output for its batch and from its targets"
        return Verdict("input_ignored", None, cause, evidence, remedy, 0, 1.0)


def _are_data(batch: Any, other: Any) -> bool:
    pairs = zip(tensors_of(batch), tensors_of(other), strict=False)
    return any((one.is_floating_point() or one.ndim > 1) and _differ(one, another) for one, another in pairs)


def _differ(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape or not torch.equal(one, other)
