# SPDX-License-Identifier: Apache-2.0
"""Saves the moments of the optimizers of an unchanged run in 8 or 16 bits."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from lightning_optkit._checks import check_one_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.refusals import refuse_split_parameters, refuse_twice
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.optimizers.compressed import (
    COMPRESSED_DTYPES,
    compressed_state_dict,
    why_not_compressible,
    widened_state_dict,
)
from lightning_optkit.step import OnePassOptimizer

__all__ = ["CompressCheckpoint"]


class CompressCheckpoint(FitCallback):
    """Saves the moments of every optimizer in 8 or 16 bits, and widens them when a run is resumed.

    A checkpoint of AdamW in fp32 takes 6.1 bytes per parameter instead of 12 ("int8"), or 8. Weights, averages, points
    and low-order parts are saved as they are, and so is state in 8 bits already. Moments are rounded to nearest, as
    `compressed_state_dict` describes, so a resumed run is close to the uninterrupted one, not equal, unless the state
    is as narrow in training (`state_dtype`).

    Optimizers of this package load such a checkpoint without this callback; torch's need it, or `widened_state_dict`.
    On one device or under DDP.

    Args:
        state_dtype: "int8" or torch.bfloat16.

    Raises:
        ValueError: for another dtype; when the fit starts, for an optimizer without a one-pass rule, of whose state it
            is not known which numbers are moments, and for strategies that split parameters.

    Example:
        >>> trainer = pl.Trainer(callbacks=[CompressCheckpoint()], logger=False)
    """

    def __init__(self, state_dtype: Literal["int8"] | torch.dtype = "int8") -> None:
        check_one_of(type(self).__name__, "state_dtype", state_dtype, COMPRESSED_DTYPES)
        self.state_dtype = state_dtype

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_twice(self, trainer)
            refuse_split_parameters(self, trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = set(pl_module.parameters())
        for optimizer in Run(trainer).optimizers:
            params = {param for group in optimizer.param_groups for param in group["params"]}
            if params.isdisjoint(trained):  # Lightning's stand-in for no optimizer at all
                continue
            self._check(optimizer)
            if not isinstance(optimizer, OnePassOptimizer):
                self._at_end(optimizer.register_load_state_dict_pre_hook(_widen).remove)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        saved = checkpoint.get("optimizer_states", [])
        for place, optimizer in enumerate(trainer.optimizers[: len(saved)]):
            if why_not_compressible(optimizer) is None:
                saved[place] = compressed_state_dict(optimizer, self.state_dtype, saved[place])

    # --- implementation ---

    def _check(self, optimizer: Optimizer) -> None:
        reason = why_not_compressible(optimizer)
        if reason is not None:
            raise ValueError(
                f"{type(self).__name__}(state_dtype={self.state_dtype!r}): of the state of {type(optimizer).__name__} "
                f"it is not known which numbers are moments ({reason}); use an optimizer of lightning_optkit."
            )


def _widen(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return widened_state_dict(state_dict)
