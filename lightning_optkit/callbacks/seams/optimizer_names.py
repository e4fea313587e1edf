# SPDX-License-Identifier: Apache-2.0
"""What the optimizers of a run are called: by the modules whose parameters they hold."""

from collections import Counter

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optkit.diagnostics.measure.parameters import parameters_of, plain_name
from lightning_optkit.step.shards import reshard

__all__ = ["held_modules", "optimizer_names"]


def optimizer_names(trainer: pl.Trainer) -> list[str]:
    """A name for each optimizer, all different: "generator", or "optimizer 1" if its modules give none."""
    optimizers = trainer.optimizers
    names = [_joined(held_modules(trainer.lightning_module, optimizer)) for optimizer in optimizers]
    counts = Counter(names)
    return [
        name if name and counts[name] == 1 else f"optimizer {place}" + (f", {name}" if name else "")
        for place, name in enumerate(names)
    ]


def held_modules(module: nn.Module, optimizer: Optimizer) -> list[str]:
    """The largest modules all of whose parameters the optimizer holds, and single parameters; "" is the whole module.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
        >>> held_modules(net, torch.optim.SGD([*net[0].parameters(), net[2].bias]))
        ['0', '2.bias']
    """
    reshard(module)  # else a validation has left other parameters than those of the optimizer
    return [plain_name(name) for name in _held(module, "", set(parameters_of(optimizer)))]


def _held(module: nn.Module, name: str, params: set[Tensor]) -> list[str]:
    own = set(module.parameters())
    if not own & params:
        return []
    if own <= params:
        return [name]
    prefix = f"{name}." if name else ""
    found = [part for child, each in module.named_children() for part in _held(each, f"{prefix}{child}", params)]
    return found + [f"{prefix}{own_name}" for own_name, p in module.named_parameters(recurse=False) if p in params]


def _joined(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} to {names[-1]}"
