# SPDX-License-Identifier: Apache-2.0
"""Handles schedulers from configure_optimizers: no other schedule may set the same value."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from lightning_optkit._torch_private import schedulers_within
from lightning_optkit.callbacks.scheduling.group_targets import group_targets
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.overrides import override, restore

__all__ = ["base_on_largest", "refuse_other_schedules", "schedulers_of", "take_over_schedulers"]


def refuse_other_schedules(owner: str, trainer: pl.Trainer) -> None:
    """Raises if a callback of Lightning schedules the learning rate."""
    if callbacks_of(trainer, StochasticWeightAveraging):
        raise ValueError(
            f"{owner}(...): StochasticWeightAveraging sets the learning rate itself; remove one of the two."
        )


def take_over_schedulers(
    owner: str, trainer: pl.Trainer, pl_module: pl.LightningModule, replaces: bool, verbose: bool
) -> Callable[[], None]:
    """Removes the schedulers of configure_optimizers and reverts their effect; the result gives them back.

    A module with manual optimization still finds them in `lr_schedulers()`, and may call their `step`: it does nothing.

    Raises:
        ValueError: if there are any and `replaces` is False, or they cannot be removed.
    """
    configs = trainer.strategy.lr_scheduler_configs
    schedulers = list(schedulers_of(trainer))
    names = ", ".join(dict.fromkeys(type(scheduler).__name__ for scheduler in schedulers))
    if schedulers:
        _check_replaceable(owner, names, schedulers, replaces)
    removed = list(configs)
    let_go = _hold(pl_module, [config.scheduler for config in removed], schedulers)
    configs.clear()
    cycled = [group for scheduler in schedulers if isinstance(scheduler, OneCycleLR) for group in _cycled(scheduler)]
    ratios = [group["initial_lr"] / group["max_lr"] for group in cycled]
    base_on_largest(cycled)
    if removed:
        for target in group_targets(trainer.optimizers, "lr", None):
            target.write(target.base)
    if removed and verbose:
        more = "; its largest rate is the base, and the momentum that it has set stays" if cycled else ""
        rank_zero_info(f"{owner}: in place of {names}, which configure_optimizers returns, until the fit ends{more}.")

    def give_back() -> None:
        let_go()
        configs[:] = removed + configs
        again = [group for scheduler in schedulers if isinstance(scheduler, OneCycleLR) for group in _cycled(scheduler)]
        for group, ratio in zip(again, ratios, strict=False):  # a restored optimizer has other groups
            group["initial_lr"] = ratio * group["max_lr"]

    return give_back


def _hold(pl_module: pl.LightningModule, returned: list[Any], schedulers: list[Any]) -> Callable[[], None]:
    """Makes schedulers that the module steps itself stand still; the result lets them go.

    By their class, since their state dict would hold an attribute of theirs.
    """
    if pl_module.automatic_optimization or not returned:
        return lambda: None
    classes = [type(scheduler) for scheduler in schedulers]
    for scheduler, cls in zip(schedulers, classes, strict=True):
        still = {name: _stand_still for name in ("step", "step_update") if hasattr(cls, name)}  # the second is timm's
        scheduler.__class__ = type(cls.__name__, (cls,), {**still, "__module__": cls.__module__})
    found = partial(_returned, returned)
    override(pl_module, "lr_schedulers", found)

    def let_go() -> None:
        restore(pl_module, "lr_schedulers", found)
        for scheduler, cls in zip(schedulers, classes, strict=True):
            scheduler.__class__ = cls

    return let_go


def _stand_still(*args: Any, **kwargs: Any) -> None:
    pass


def _returned(schedulers: list[Any]) -> Any:
    """As `LightningModule.lr_schedulers` returns them."""
    return schedulers[0] if len(schedulers) == 1 else schedulers


def base_on_largest(groups: Iterable[dict[str, Any]]) -> None:
    """In groups of OneCycleLR, makes its largest rate the base: it has overwritten the optimizer's own rate."""
    for group in groups:
        if {"max_lr", "min_lr"} <= group.keys():
            group["initial_lr"] = float(group["max_lr"])


def _cycled(scheduler: OneCycleLR) -> list[dict[str, Any]]:
    return [group for group in scheduler.optimizer.param_groups if "max_lr" in group]


def _check_replaceable(owner: str, names: str, schedulers: list[Any], replaces: bool) -> None:
    if not replaces:
        raise ValueError(
            f"{owner}(replace_schedulers=False): configure_optimizers returns {names}, and both would set the same "
            f"learning rate; remove one, or say {owner}(replace_schedulers=True)."
        )
    if any(isinstance(scheduler, CyclicLR) for scheduler in schedulers):
        raise ValueError(
            f"{owner}(replace_schedulers=True): {names} has overwritten the optimizer's own learning rate and momentum "
            "when it was built; remove it from configure_optimizers (schedules.triangular has its cycles)."
        )


def schedulers_of(trainer: pl.Trainer) -> Iterator[Any]:
    """The schedulers of configure_optimizers, and those inside `SequentialLR` or `ChainedScheduler`."""
    for config in trainer.lr_scheduler_configs:
        yield from _flat(config.scheduler)


def _flat(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for part in schedulers_within(scheduler):
        yield from _flat(part)
