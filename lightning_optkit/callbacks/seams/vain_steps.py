# SPDX-License-Identifier: Apache-2.0
"""Optimizers that are stepped and find no gradient at all: such steps are none for `watch_steps`.

Only modules that step optimizers themselves have them: a generator, say, whose output is detached in its own step too,
or a module that makes no backward pass. Hooks count those steps, and go after the first gradient, so that they cost
nothing afterwards.
"""

from collections.abc import Set
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optkit.callbacks.seams.steps import was_updated
from lightning_optkit.diagnostics._observations import SilentSeen
from lightning_optkit.diagnostics.measure.parameters import layer_of, parameters_of, plain_name

__all__ = ["VainSteps"]

_ELEMENTS = 64  # of each parameter
_STEPS = 20  # as in the rule


class VainSteps:
    """The optimizers that a fit begins with, until `close`.

    Args:
        trainer: The Trainer.
        pl_module: The module.
    """

    has_backward = False  # set by what sees backward passes of Lightning's
    is_due = False  # whether there is something to be told anew; reset by whom it is told

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps: dict[Optimizer, int] = {}
        self._handles: dict[Optimizer, list[RemovableHandle]] = {}
        optimizers = [each for each in trainer.optimizers if isinstance(each, Optimizer)]
        self._weights: dict[Tensor, Tensor] = {}  # some elements of each, after the first step that finds no gradient
        self._num = 0  # the optimizers
        if pl_module.automatic_optimization:
            return
        self._num = len(optimizers)
        for optimizer in optimizers:
            self._steps[optimizer] = 0
            # Before the step too: it may clear the gradients itself.
            hooks = (optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after))
            self._handles[optimizer] = [*hooks]

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer in self._steps and any(p.grad is not None for p in parameters_of(optimizer)):
            del self._steps[optimizer]

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer not in self._steps:
            return
        params = parameters_of(optimizer)
        if any(was_updated(optimizer, p) for p in params):
            del self._steps[optimizer]
        elif any(p.requires_grad for p in params):  # others are frozen, and are stepped for nothing on purpose
            self._steps[optimizer] += 1
            self.is_due |= self._steps[optimizer] == _STEPS
            if self._steps[optimizer] == 1:
                self._weights.update({p: _some(p).clone() for p in params})

    def without_backward(self) -> int:
        """The steps of all optimizers, if none has had a gradient, no backward pass began and no weight has changed."""
        if self.has_backward or len(self._steps) < self._num:
            return 0
        is_same = all(torch.equal(_some(p), former) for p, former in self._weights.items())
        return sum(self._steps.values()) if is_same else 0  # weights change without a gradient in evolution, say

    def silent(self, pl_module: nn.Module, called: Set[str]) -> list[SilentSeen]:
        """The parameters of those that have never had a gradient, in the order of the module.

        Where no optimizer has taken a step, no module is known to be called.

        Args:
            pl_module: The module.
            called: Modules that every measured step called.
        """
        for optimizer in self._handles.keys() - self._steps.keys():  # not within a hook, where torch goes through them
            self._remove(optimizer)
        if len(self._steps) in (0, self._num):  # if none has had one, this is no matter of parameters
            return []
        steps = {p: num for optimizer, num in self._steps.items() if num for p in parameters_of(optimizer)}
        found = []
        for name, param in pl_module.named_parameters():
            if param in steps and param.requires_grad:
                layer = layer_of(name)
                is_called = not layer or layer in called
                found.append(SilentSeen(plain_name(name), layer, steps[param], is_called, False, is_whole=True))
        return found

    def close(self) -> None:
        """Removes the hooks; no-op the second time."""
        for optimizer in [*self._handles]:
            self._remove(optimizer)

    def _remove(self, optimizer: Optimizer) -> None:
        for handle in self._handles.pop(optimizer):
            handle.remove()


def _some(p: Tensor) -> Tensor:
    return p.detach().reshape(-1)[:_ELEMENTS]
