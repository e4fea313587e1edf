# SPDX-License-Identifier: Apache-2.0
"""Batches in a row after which a step was due, of which none changed a weight."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_optkit.callbacks.seams.lightning_packages import loss_scaler
from lightning_optkit.callbacks.seams.lightning_private import accumulates
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.diagnostics._observations import IdleSeen
from lightning_optkit.diagnostics.measure.parameters import plain_name

__all__ = ["IdleBatches"]

_BATCHES = 4  # for which a step was due, or after which nothing is left of the gradient
_BATCHES_BY_HAND = 256  # a module that steps by itself may add gradients over an epoch
_ELEMENTS = 64  # of each parameter


class IdleBatches:
    """The batches of one fit; `seen` is None unless there is something to tell.

    From the second such batch on, it is noted which parameters of the module a gradient arrives at, whatever clears it
    afterwards. That none does is withdrawn with the next step.
    """

    def __init__(self) -> None:
        self.seen: IdleSeen | None = None
        self.is_counting = False  # until then there is nothing to look at where a step follows the backward pass
        self._num = 0
        self._weights: dict[Tensor, Tensor] = {}  # some elements of each, after the first of these batches
        self._arrived: set[str] = set()  # by name: within a batch, parameters of FSDP2 are others than after it
        self._handles: list[RemovableHandle] = []

    def before_backward(self, pl_module: nn.Module) -> None:
        """A backward pass of Lightning's begins."""
        if self._num and self.seen is None and not self._handles:
            params = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad]
            for name, param in params:
                watch: Any = param.register_post_accumulate_grad_hook  # torch has no types for it
                self._handles.append(watch(partial(self._arrives, name)))

    def after_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, has_stepped: bool) -> None:
        """Judges a batch with a backward pass; `step` is the number of steps so far."""
        self.close()
        if has_stepped:
            self._num = 0
            self._arrived.clear()
            self.seen = self.seen if self.seen is None or self.seen.arrived else None
        elif self.seen is None and loss_scaler(trainer) is None:
            self._after_idle(trainer, pl_module, step)
        self.is_counting = self._num > 0 or self.seen is not None

    def _arrives(self, name: str, param: Tensor) -> None:
        self._arrived.add(name)

    def close(self) -> None:
        """Removes hooks; no-op the second time."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _after_idle(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        run = Run(trainer)
        optimized = set(run.parameters)
        params = [p for p in optimized if p.is_floating_point()]
        is_automatic = pl_module.automatic_optimization
        if not params or len(run.optimizers) < len(trainer.optimizers) or (is_automatic and accumulates(trainer)):
            return
        if not self._num:
            self._weights = {p: _some(p).clone() for p in params}
        self._num += 1
        grads = [p.grad for p in params if p.grad is not None]
        is_by_hand = not is_automatic and bool(grads)
        own = {p: name for name, p in pl_module.named_parameters()}
        # A step cannot do anything then, so that no other batch need be waited for.
        is_vain = not any(p.requires_grad and p in own for p in params)
        if self._num < (1 if is_vain else _BATCHES):
            return
        if is_by_hand and self._num <= min(_BATCHES_BY_HAND, run.steps_in_epoch):
            return
        is_same = all(torch.equal(_some(p), self._weights[p]) for p in params if p in self._weights)
        if is_same and all(bool(_some(grad).isfinite().all()) for grad in grads if not grad.is_sparse):
            frozen = sum(not p.requires_grad for p in params)
            strays = len(set(params) - own.keys())
            # The first of these batches is not watched, but nobody clears what is in no optimizer.
            arrived = {
                p for p, name in own.items() if name in self._arrived or (p.grad is not None and p not in optimized)
            }
            outside = tuple(plain_name(name) for p, name in own.items() if p in arrived and p not in optimized)
            self.seen = IdleSeen(
                step, self._num, len(params), frozen, strays, len(grads), not is_automatic,
                own=sum(p.requires_grad for p in own), arrived=len(arrived), outside=outside,
            )  # fmt: skip


def _some(t: Tensor) -> Tensor:
    return t.detach().reshape(-1)[:_ELEMENTS]
