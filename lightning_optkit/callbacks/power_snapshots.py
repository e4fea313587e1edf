# SPDX-License-Identifier: Apache-2.0
"""Writes the averages that `post_hoc_ema` needs, while the run goes on."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_optkit._checks import check_in, check_int, check_path, shown
from lightning_optkit.averaging import PowerEMA
from lightning_optkit.averaging.post_hoc_ema import snapshot_name
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_private import key_of_state
from lightning_optkit.callbacks.seams.refusals import refuse_listed_twice
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.weight_averaging import WeightAveraging

__all__ = ["PowerSnapshots"]


class PowerSnapshots(FitCallback):
    """Writes every `PowerEMA` of the run to a file now and then, and at the end; `stored_snapshots` reads them.

        trainer = pl.Trainer(callbacks=[
            WeightAveraging(PowerEMA(0.05)),
            WeightAveraging(PowerEMA(0.1), evaluate=False),
            PowerSnapshots("snapshots"),
        ])
        trainer.fit(module)
        weights = post_hoc_ema(stored_snapshots("snapshots"), std=0.08)

    A file has the whole state dict with the average in it, and is named after its `std` and its number of updates. It
    is written beside its name and renamed, so none is damaged. A resumed run writes the ones that are missing, and
    those after its checkpoint again.

    Args:
        dirpath: The folder, which is created. Give every run its own.
        every: Optimizer steps between two files; or a float in (0, 1], a fraction of the run. The paper stores some 16
            to 128 of each length.

    Raises:
        ValueError: for an argument out of range; when the fit starts, without `WeightAveraging(PowerEMA(...))`, or if
            `every` is a fraction of a run of unknown length.

    Cost: a copy of the weights on the CPU, and a file, for each average.

    Source: Karras et al. 2024, arXiv:2312.02696, Section 3.2.

    Example:
        >>> trainer = pl.Trainer(callbacks=[PowerSnapshots("snapshots", every=1000)], logger=False, max_epochs=1)
    """

    def __init__(self, dirpath: str | os.PathLike[str], every: int | float = 1 / 16) -> None:
        owner = type(self).__name__
        self.dirpath = check_path(owner, "dirpath", dirpath)
        self.every = (
            check_in(owner, "every", every, "(0, 1]")
            if isinstance(every, float)
            else check_int(owner, "every", every, minimum=1)
        )
        self._interval = self._written_at = 0

    @property
    def state_key(self) -> str:
        """Separate states for several folders."""
        return key_of_state(self, dirpath=str(self.dirpath))

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_listed_twice(self, trainer)
            if not self._averages(trainer):
                raise ValueError(
                    f"{type(self).__name__}(dirpath={shown(str(self.dirpath))}): the run has no PowerEMA; add "
                    "WeightAveraging(PowerEMA(0.05)) and WeightAveraging(PowerEMA(0.1), evaluate=False)."
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._interval, self._written_at = int(self.every), Run(trainer).step
        if isinstance(self.every, float):
            total = Run(trainer).steps_at_end()
            if total is None:
                raise ValueError(
                    f"{type(self).__name__}(every={self.every!r}): every must be a number of steps where the length of "
                    "the run is unknown."
                )
            self._interval = max(1, round(self.every * total))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = Run(trainer).step
        if step != self._written_at and step % self._interval == 0:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module)

    # --- implementation ---

    @staticmethod
    def _averages(trainer: pl.Trainer) -> list[WeightAveraging]:
        return [
            callback for callback in callbacks_of(trainer, WeightAveraging) if isinstance(callback.average, PowerEMA)
        ]

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._written_at = Run(trainer).step
        for callback in self._averages(trainer):
            assert isinstance(callback.average, PowerEMA)
            if not callback.num_averaged:
                continue
            target = Path(self.dirpath) / snapshot_name(callback.average.std, callback.num_averaged)
            weights = callback.averaged_state_dict(pl_module)  # every process takes part
            if trainer.is_global_zero:
                target.parent.mkdir(parents=True, exist_ok=True)
                beside = target.with_name(f".{target.name}.{os.getpid()}")
                torch.save({"state_dict": weights}, beside)
                os.replace(beside, target)
