# SPDX-License-Identifier: Apache-2.0
"""Parameters that no step of their optimizer has had a gradient for.

All are watched at first; each leaves with its first gradient, so that after a few steps there is next to nothing to do.
A gradient that arrives between the looks at them is not seen, so what is said of them is looked at in every step.
"""

from collections.abc import Set
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optkit.callbacks.seams.steps import was_updated
from lightning_optkit.diagnostics._observations import SilentSeen
from lightning_optkit.diagnostics.measure.parameters import layer_of, parameters_of, plain_name
from lightning_optkit.step.shards import reshard

__all__ = ["Presence"]


@dataclass
class _Watched:
    params: set[Tensor]
    steps: int = 0
    has_others: bool = False


class Presence:
    """The optimizers of one fit. A parameter that is added during the fit is not watched."""

    def __init__(self) -> None:
        self._watched: dict[Optimizer, _Watched] = {}

    def after_step(self, optimizer: Optimizer) -> bool:
        """Lets go of the parameters that had a gradient; whether there were any."""
        watched = self._watched.get(optimizer)
        if watched is None:
            watched = self._watched[optimizer] = _Watched({p for p in parameters_of(optimizer) if p.requires_grad})
        watched.steps += 1
        before = len(watched.params)
        if not before:
            return False
        watched.params = {p for p in watched.params if p.requires_grad and not was_updated(optimizer, p)}
        has_let_go = len(watched.params) < before
        watched.has_others |= has_let_go
        return has_let_go

    def silent(self, pl_module: nn.Module, called: Set[str], without_grad: Set[str]) -> list[SilentSeen]:
        """Those without any gradient, in the order of the module.

        Args:
            pl_module: The module.
            called: Modules that every measured step called.
            without_grad: Modules that were called under `torch.no_grad()`.
        """
        steps = {p: each.steps for each in self._watched.values() if each.has_others for p in each.params}
        if not steps:
            return []
        reshard(pl_module)  # else a validation has left other parameters than those of the optimizer
        found = []
        for name, param in pl_module.named_parameters():
            if param in steps:
                layer = layer_of(name)
                is_called = not layer or layer in called
                found.append(SilentSeen(plain_name(name), layer, steps[param], is_called, layer in without_grad))
        return found
