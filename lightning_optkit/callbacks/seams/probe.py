# SPDX-License-Identifier: Apache-2.0
"""The loss of a batch along the update that it led to: eight forward passes, after which everything is as before."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_optkit.callbacks.seams.lightning_private import is_compiled
from lightning_optkit.callbacks.seams.replay import replayed_loss
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.diagnostics._signals import ProbeSeen

__all__ = ["Probe", "can_probe"]


def can_probe(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether `training_step` can be run again: one process, automatic optimization, nothing compiled."""
    return trainer.world_size == 1 and pl_module.automatic_optimization and not is_compiled(pl_module)


class Probe:
    """Copies the weights; created right before a batch that ends with a step."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._before = {p: p.detach().clone() for p in dict.fromkeys(Run(trainer).parameters)}

    def measure(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: tuple[Any, int],
        other: tuple[Any, int] | None,
        rate: float,
    ) -> ProbeSeen:
        """The losses, after the step, of its batch and of another one."""
        after = {p: p.detach().clone() for p in self._before}

        def at(share: float, batch: tuple[Any, int] | None) -> float:
            """The loss at this multiple of the update."""
            for p, before in self._before.items():
                p.data.copy_(before + share * (after[p] - before) if share else before)
            loss = None if batch is None else replayed_loss(trainer, pl_module, *batch)
            return float("nan") if loss is None else float(loss)

        exchanged = _exchanged(batch[0])
        try:
            return ProbeSeen(
                rate=rate,
                before=at(0.0, batch),
                permuted=at(0.0, None if exchanged is None else (exchanged, batch[1])),
                other_before=at(0.0, other),
                tenth=at(0.1, batch),
                full=at(1.0, batch),
                ten=at(10.0, batch),
                thirty=at(30.0, batch),
                other_thirty=at(30.0, other),
            )
        finally:
            for p, value in after.items():
                p.data.copy_(value)


def _exchanged(batch: Any) -> Any:
    """The batch with its first tensor moved on by half of the samples; None if it is not inputs and targets."""
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(batch[0], Tensor):
        return None
    return type(batch)([torch.roll(batch[0], max(1, len(batch[0]) // 2), 0), *batch[1:]])
