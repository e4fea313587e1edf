# SPDX-License-Identifier: Apache-2.0
"""Trains a schedule-free optimizer at y, and evaluates and saves the average x."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.checkpointed_weights import as_saved
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.optimizers._schedule_free import ScheduleFreeOptimizer
from lightning_optkit.step.shards import reshard

__all__ = ["ScheduleFree"]


class ScheduleFree(FitCallback):
    """Switches `ScheduleFreeSGD` and `ScheduleFreeAdamW` between training and evaluation.

    Validation runs on the average, every checkpoint's `state_dict` holds it (with y in the optimizer's state, for
    resuming), and the module has it when `fit` returns. `Fuse` adds this callback. Without it the first optimizer step
    raises.

    Raises:
        ValueError: when the fit starts, if there are two of it, or the run has no schedule-free optimizer.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ScheduleFree()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._optimizers: list[ScheduleFreeOptimizer] = []

    # --- hooks, in the order Lightning calls them ---

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if callbacks_of(trainer, ScheduleFree, but=self):
            raise ValueError(f"{type(self).__name__}(): given twice; one switches every optimizer.")
        self._optimizers = [o for o in trainer.optimizers if isinstance(o, ScheduleFreeOptimizer)]
        if not self._optimizers:
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
            raise ValueError(
                f"{type(self).__name__}(): needs ScheduleFreeSGD or ScheduleFreeAdamW; this run has {names}."
            )
        self._override(pl_module, "on_save_checkpoint", self._wrap_on_save_checkpoint(trainer, pl_module))
        self._at_end(partial(self._eval, pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._train(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._eval(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._train(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._eval(pl_module)

    # --- implementation ---

    def _train(self, pl_module: pl.LightningModule) -> None:
        reshard(pl_module)
        for optimizer in self._optimizers:
            optimizer.train()

    def _eval(self, pl_module: pl.LightningModule) -> None:
        reshard(pl_module)
        for optimizer in self._optimizers:
            optimizer.eval()

    def _wrap_on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[..., None]:
        # Not the callback's own hook, which Lightning skips if only weights are saved.
        original = pl_module.on_save_checkpoint

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._save_average(trainer, pl_module, checkpoint)
            original(checkpoint)

        return on_save_checkpoint

    def _save_average(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        names = dict(pl_module.named_parameters(remove_duplicate=False))
        for place, optimizer in enumerate(trainer.optimizers):
            if optimizer not in self._optimizers:
                continue
            assert isinstance(optimizer, ScheduleFreeOptimizer)
            # Every process gathers what is sharded, also those that save nothing.
            averages = {param: as_saved(trainer, x) for param, x in optimizer.averages().items()}
            points = {param: as_saved(trainer, param) for param in averages}
            for name, param in names.items():
                if param in averages and name in checkpoint["state_dict"]:
                    checkpoint["state_dict"][name] = averages[param]
            saved = checkpoint.get("optimizer_states", [])
            if averages and place < len(saved) and saved[place]:
                saved[place] = optimizer.as_evaluated(saved[place], points)

    def _forget(self) -> None:
        self._optimizers = []
