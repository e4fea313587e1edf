# SPDX-License-Identifier: Apache-2.0
"""Keeps an average of the weights, and lets validation, test, prediction and checkpoints see it."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optkit.averaging.own_pass import protect_average, update_average_
from lightning_optkit.step import Average, OnePassOptimizer

__all__ = ["WeightAveraging"]


class WeightAveraging(Callback):
    """Averages the weights over training: folded into a one-pass step, in a pass of its own after any other step.

    The average lives in the optimizer's state. From its first update on, and never before, validation runs on it, a
    full checkpoint's `state_dict` holds it (with the trained weights beside it, for resuming, under
    `current_model_state`), and the module has it when `fit` returns. Buffers are the model's own, as in
    `torch.optim.swa_utils`.

    Args:
        average: What to keep, e.g. `EMA(0.999)`.

    Example:
        >>> from lightning_optkit.averaging import EMA
        >>> trainer = pl.Trainer(callbacks=[WeightAveraging(EMA(0.99))], logger=False, enable_checkpointing=False)
    """

    def __init__(self, average: Average) -> None:
        self.average = average
        self._optimizers: list[Optimizer] = []
        self._hooks: list[RemovableHandle] = []
        self._steps = 0
        self._trained: dict[Tensor, Tensor] = {}  # while the module holds the average: the weights it was trained to

    @property
    def state_key(self) -> str:
        """Two averages in one run keep their own state."""
        return self._generate_state_key(average=repr(self.average))

    def state_dict(self) -> dict[str, Any]:
        """Optimizer steps so far, for averages that are not updated by every one of them."""
        folded = next((o for o in self._optimizers[:1] if isinstance(o, OnePassOptimizer)), None)
        return {"steps": self._steps + (folded.num_steps if folded else 0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it."""
        self._steps = state_dict["steps"]

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._trained, self._steps = {}, 0
            if any(isinstance(other, WeightAveraging) and other is not self for other in trainer.callbacks):  # type: ignore[attr-defined]
                raise ValueError("WeightAveraging(...): given twice; a run keeps one average.")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._optimizers = list(trainer.optimizers)
        for optimizer in self._optimizers:
            if isinstance(optimizer, OnePassOptimizer):
                optimizer.keep_average(self.average)
            else:
                self._hooks.append(optimizer.register_step_post_hook(self._after_step))
                self._hooks += protect_average(optimizer, self.average)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run that was begun in another way may have left state without a step count.
        for optimizer in self._optimizers if self._steps else ():
            if isinstance(optimizer, OnePassOptimizer):
                optimizer.resume_counting(self._steps)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.training and "current_model_state" in checkpoint:
            pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_average()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_trained()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        averages = self._averages()
        if not averages:
            return
        names = dict(pl_module.named_parameters(remove_duplicate=False))
        checkpoint["current_model_state"] = trained = dict(checkpoint["state_dict"])
        for name, param in names.items():
            if param in averages and name in checkpoint["state_dict"]:
                trained[name] = self._trained.get(param, param.detach())
                checkpoint["state_dict"][name] = averages[param].to(param.dtype)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._show_trained()
        self._remove_hooks()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show_average()
        self._remove_hooks()

    # --- what they do ---

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0:
            return
        if optimizer is self._optimizers[0]:
            self._steps += 1
        update_average_(optimizer, self.average, self._steps)

    def _averages(self) -> dict[Tensor, Tensor]:
        """The average of every parameter that has one with at least one update."""
        name = self.average.state_name
        return {
            param: state[name]
            for optimizer in self._optimizers
            for param, state in optimizer.state.items()
            if name in state and float(state["num_averaged"]) > 0
        }

    @torch.no_grad()
    def _show_average(self) -> None:
        if not self._trained:
            for param, average in self._averages().items():
                self._trained[param] = param.detach().clone()
                param.copy_(average)

    @torch.no_grad()
    def _show_trained(self) -> None:
        for param, trained in self._trained.items():
            param.copy_(trained)
        self._trained = {}

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
