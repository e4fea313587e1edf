# SPDX-License-Identifier: Apache-2.0
"""Optimizers that are stepped, beside others, and find no gradient at all: such steps are none for `watch_steps`.

Only modules that step several optimizers themselves have them: a generator, say, whose output is detached in its own
step too. Hooks count those steps, and go after the first gradient, so that they cost nothing afterwards.
"""

from collections.abc import Set
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optkit.callbacks.seams.steps import was_updated
from lightning_optkit.diagnostics._observations import SilentSeen
from lightning_optkit.diagnostics.measure.parameters import layer_of, parameters_of, plain_name

__all__ = ["VainSteps"]


class VainSteps:
    """The optimizers that a fit begins with, until `close`.

    Args:
        trainer: The Trainer.
        pl_module: The module.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps: dict[Optimizer, int] = {}
        self._handles: dict[Optimizer, list[RemovableHandle]] = {}
        optimizers = [each for each in trainer.optimizers if isinstance(each, Optimizer)]
        if pl_module.automatic_optimization or len(optimizers) < 2:
            return
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

    def silent(self, pl_module: nn.Module, called: Set[str]) -> list[SilentSeen]:
        """The parameters of those that have never had a gradient, in the order of the module.

        Where no optimizer has taken a step, no module is known to be called.

        Args:
            pl_module: The module.
            called: Modules that every measured step called.
        """
        for optimizer in self._handles.keys() - self._steps.keys():  # not within a hook, where torch goes through them
            self._remove(optimizer)
        if not self._steps:
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
