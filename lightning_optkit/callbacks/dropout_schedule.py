# SPDX-License-Identifier: Apache-2.0
"""Schedules the dropout probability over the run."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_optkit.callbacks.hyperparameter_schedule import HyperparameterSchedule
from lightning_optkit.callbacks.scheduling.clock import Interval
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.schedules import Schedule

__all__ = ["DropoutSchedule"]


class DropoutSchedule(HyperparameterSchedule):
    """Multiplies the `p` of every dropout module by a schedule; short for `HyperparameterSchedule("dropout", ...)`.

    It covers the dropout modules of torch and of `lightning_optkit.layers`, and nonzero dropout inside attention,
    recurrent and add + norm layers. The original values are restored after the fit. Growing dropout is a curriculum
    (Morerio et al.); dropout only in an early or late phase is that of Liu et al. A compiled module is recompiled for
    every new value, so use a `join` of constants there.

    Args:
        schedule: The factor as a function of progress, e.g. `linear(0.0, 1.0)`.
        interval: Unit of integer lengths, see `LRSchedule`.
        base: Value at factor 1, in [0, 1], for all modules. Default: each module's own.
        log: Log the value if there is a logger.
        verbose: Print schedule, length and base values when training starts.
        total: Length of the run in that unit. Default: derived from the Trainer, except for tokens.
        count: Samples or tokens of a batch, see `LRSchedule`.

    Raises:
        ValueError: for an argument out of range; when the training starts, if the module has no dropout, all of it is
            0, or another callback schedules it.

    Source: Morerio et al. 2017, "Curriculum Dropout", arXiv:1703.06229; Liu et al. 2023, "Dropout Reduces
    Underfitting", arXiv:2303.01500.

    Example:
        >>> from lightning_optkit.schedules import linear
        >>> trainer = pl.Trainer(callbacks=[DropoutSchedule(linear(0.0, 1.0))], logger=False)
    """

    def __init__(
        self,
        schedule: Schedule,
        interval: Interval = "step",
        base: float | None = None,
        log: bool = True,
        verbose: bool = True,
        *,
        total: int | None = None,
        count: Callable[[Any], int] | None = None,
    ) -> None:
        super().__init__("dropout", schedule, interval, base=base, total=total, count=count, log=log, verbose=verbose)

    @property
    def _call(self) -> str:
        return f"{self._owner}(schedule={self.schedule!r}): it multiplies dropout, but"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for other in callbacks_of(trainer, HyperparameterSchedule, but=self):
            if other.name == self.name:
                raise ValueError(f"{self._owner}(...): {other._owner} schedules dropout too; use one of the two.")
