# SPDX-License-Identifier: Apache-2.0
"""Numbers the parameters in saved optimizer states by the module, as FSDP2 reads them, and not by the groups.

torch numbers them in the order of the groups. Lightning's FSDP2 strategy takes the numbers of a file saved by one
process or DDP for places in `module.parameters()`, and gives the moments of regrouped parameters to others of the same
shape. torch itself only compares numbers within a file, so any numbering loads there.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.optim import Optimizer

from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.overrides import override

__all__ = ["number_by_module"]


def number_by_module(trainer: pl.Trainer) -> None:
    """Overrides how the strategy of a run saves its optimizers, or under FSDP2 loads them.

    The overrides stay with the strategy: checkpoints are also written on an exception and after a fit.
    """
    strategy = trainer.strategy
    shards = is_a(strategy, ModelParallelStrategy)
    name, function = ("load_checkpoint", _checked) if shards else ("optimizer_state", _numbered)
    current = getattr(strategy, name)
    while isinstance(current, partial):  # perhaps below an override of another seam
        if current.func is function:
            return
        current = vars(current).get("replaced")
    override(strategy, name, partial(function, strategy, getattr(strategy, name)))


def _numbered(strategy: Strategy, original: Callable[[Optimizer], Any], optimizer: Optimizer) -> Any:
    """Lightning's saved state of an optimizer, with other numbers."""
    saved = original(optimizer)
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(saved, dict) or not groups or "param_groups" not in saved:
        return saved
    places = {param: place for place, param in enumerate(_module(strategy).parameters())}
    numbers = {
        number: places.get(param)
        for held, group in zip(saved["param_groups"], groups, strict=False)
        for number, param in zip(held["params"], group["params"], strict=False)
    }
    if None in numbers.values():  # of parameters that are not the module's nobody knows the place
        return saved
    return {
        **saved,
        "state": {numbers.get(number, number): state for number, state in saved["state"].items()},
        "param_groups": [{**g, "params": [numbers[number] for number in g["params"]]} for g in saved["param_groups"]],
    }


def _module(strategy: Strategy) -> pl.LightningModule:
    assert strategy.lightning_module is not None
    return strategy.lightning_module


def _checked(
    strategy: Strategy,
    load: Callable[..., dict[str, Any]],
    checkpoint_path: str | Path,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Refuses a file whose numbers are those of groups in another order than the module's."""
    checkpoint = load(checkpoint_path, weights_only=weights_only)
    places = {param: place for place, param in enumerate(_module(strategy).parameters())}
    for saved, optimizer in zip(checkpoint.get("optimizer_states", []), strategy.optimizers, strict=False):
        groups = saved.get("param_groups", []) if isinstance(saved, dict) else []
        numbers = [*chain.from_iterable(group["params"] for group in groups)]
        order = [places.get(param, -1) for group in optimizer.param_groups for param in group["params"]]
        if len(groups) > 1 and numbers == [*range(len(numbers))] and order != sorted(order):
            raise RuntimeError(
                f"{type(optimizer).__name__}: {checkpoint_path} does not say which state is of which parameter, since "
                "it was saved without callbacks of lightning_optkit; resume it once with the strategy that saved it "
                "and ExactResume(), Fuse() or ParameterGroups(), and save it again."
            )
    return checkpoint
