# SPDX-License-Identifier: Apache-2.0
"""The gradients that a process has accumulated for its next step, and the means of the epoch, before a batch."""

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit.callbacks._gradients_of_processes import Gradients, are_rows
from lightning_optkit.callbacks._metrics_so_far import held_sums
from lightning_optkit.callbacks.seams.fetches_in_step import fetches_in_step
from lightning_optkit.callbacks.seams.lightning_private import accumulates, batch_progress
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.step.shards import local, reshard, reshard_after_failure

__all__ = ["OpenWindow", "set_window"]


class OpenWindow:
    """Follows the backward passes and steps of a fit, to know which gradients a next step will use."""

    def __init__(self) -> None:
        self._has_begun = False  # a backward pass of the current batch
        self._was_open = False  # before the current batch, with manual optimization
        self._seen = False  # a backward pass of this fit
        self._stepped: list[Optimizer] = []  # since the last backward pass
        self.sums: dict[str, dict[str, Any]] = {}  # of what the epoch has logged, before the current batch

    def batch_begins(self, trainer: pl.Trainer) -> None:
        self.sums = held_sums(trainer)
        self._was_open, self._has_begun = self._seen and not self._stepped, False

    def backward_begins(self) -> None:
        self._has_begun = self._seen = True
        self._stepped = []

    def steps(self, optimizer: Optimizer) -> None:
        self._stepped.append(optimizer)

    def gradients(self, trainer: pl.Trainer, is_unfinished: bool) -> Gradients | None:
        """The gradients of an open window, copied to the CPU; None if an unfinished batch has changed them.

        Args:
            trainer: The Trainer.
            is_unfinished: Whether the current batch is repeated by a run that is resumed.
        """
        if not self._is_open(trainer, is_unfinished):
            return {}
        if is_unfinished and self._has_begun:
            return None
        _reshard(trainer)
        if trainer.lightning_module.automatic_optimization:
            return _gradients_of(trainer.lightning_module)
        used = {param for optimizer in self._stepped for group in optimizer.param_groups for param in group["params"]}
        gradients = _gradients_of(trainer.lightning_module, used)
        # A part of zeros may be one of a gradient that is not zero.
        return {name: each for name, each in gradients.items() if each["rows"] or bool(each["part"].any())}

    def _is_open(self, trainer: pl.Trainer, is_unfinished: bool) -> bool:
        batches = batch_progress(trainer).current.ready
        if not trainer.lightning_module.automatic_optimization:
            return self._was_open if is_unfinished and self._has_begun else True
        if fetches_in_step(trainer):  # Lightning clears them by the number of the batch before
            return Run(trainer).window > 1
        if is_unfinished:
            return bool((batches - 1) % Run(trainer).window)
        return bool(batches) and accumulates(trainer)


def _reshard(trainer: pl.Trainer) -> None:
    """A forward pass without a backward pass leaves parameters of FSDP2 whole, which have no gradients."""
    reshard(trainer.lightning_module)
    own = {*trainer.lightning_module.parameters()}
    if any(param not in own for param in Run(trainer).parameters):
        reshard_after_failure(trainer.lightning_module)


def _gradients_of(pl_module: pl.LightningModule, but: Collection[Tensor] = ()) -> Gradients:
    """Copies on the CPU: they are sent to the process that writes them."""
    named = [(name, param) for name, param in pl_module.named_parameters() if param not in but]
    grads = [(name, param.grad) for name, param in named if param.grad is not None]
    return {
        name: {"part": local(grad).detach().to("cpu", copy=True), "shape": tuple(grad.shape), "rows": are_rows(grad)}
        for name, grad in grads
    }


def set_window(trainer: pl.Trainer) -> None:
    """Sets the batches per step of the epoch: Lightning does so in its first hook, not called on a resume within it."""
    run = Run(trainer)
    if run.accumulation_schedule is not None:
        trainer.accumulate_grad_batches = run.window
