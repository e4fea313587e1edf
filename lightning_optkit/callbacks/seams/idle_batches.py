# SPDX-License-Identifier: Apache-2.0
"""Batches in a row after which a step was due, of which none changed a weight."""

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_optkit.callbacks.seams.lightning_packages import loss_scaler
from lightning_optkit.callbacks.seams.lightning_private import accumulates
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.diagnostics._observations import IdleSeen

__all__ = ["IdleBatches"]

_BATCHES = 4  # for which a step was due, or after which nothing is left of the gradient
_BATCHES_BY_HAND = 256  # a module that steps by itself may add gradients over an epoch
_ELEMENTS = 64  # of each parameter


class IdleBatches:
    """The batches of one fit; `seen` is None unless there is something to tell."""

    def __init__(self) -> None:
        self.seen: IdleSeen | None = None
        self._num, self._has_stepped, self._has_backward = 0, False, False
        self._weights: dict[Tensor, Tensor] = {}  # some elements of each, after the first of these batches

    def before_backward(self) -> None:
        """A backward pass of Lightning's begins."""
        self._has_backward = True

    def after_step(self) -> None:
        """An optimizer took a step."""
        self._has_stepped = True

    def after_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Judges a batch; `step` is the number of steps so far."""
        has_stepped, has_backward = self._has_stepped, self._has_backward
        self._has_stepped = self._has_backward = False
        if has_stepped:
            self._num = 0
        elif has_backward and self.seen is None and loss_scaler(trainer) is None:
            self._after_idle(trainer, pl_module, step)

    def _after_idle(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        run = Run(trainer)
        params = [p for p in run.parameters if p.is_floating_point()]
        is_automatic = pl_module.automatic_optimization
        if not params or len(run.optimizers) < len(trainer.optimizers) or (is_automatic and accumulates(trainer)):
            return
        if not self._num:
            self._weights = {p: _some(p).clone() for p in params}
        self._num += 1
        grads = [p.grad for p in params if p.grad is not None]
        is_by_hand = not is_automatic and bool(grads)
        own = set(pl_module.parameters())
        # A step cannot do anything then, so that no other batch need be waited for.
        is_vain = not any(p.requires_grad and p in own for p in params)
        if self._num < (1 if is_vain else _BATCHES):
            return
        if is_by_hand and self._num <= min(_BATCHES_BY_HAND, run.steps_in_epoch):
            return
        is_same = all(torch.equal(_some(p), self._weights[p]) for p in params if p in self._weights)
        if is_same and all(bool(_some(grad).isfinite().all()) for grad in grads if not grad.is_sparse):
            frozen = sum(not p.requires_grad for p in params)
            strays = len(set(params) - own)
            self.seen = IdleSeen(step, self._num, len(params), frozen, strays, len(grads), not is_automatic)


def _some(t: Tensor) -> Tensor:
    return t.detach().reshape(-1)[:_ELEMENTS]
