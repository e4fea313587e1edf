# SPDX-License-Identifier: Apache-2.0
"""Multiplies the base learning rates of schedules, together with any other schedule.

Each group stores its factor and its own base value, so both are in every checkpoint of the optimizer, new groups can be
distinguished, and the factor 1 restores the exact number.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler

__all__ = ["forget_factor", "multiply_bases"]

_FACTOR, _OWN = "initial_lr_factor", "initial_lr_unscaled"


def multiply_bases(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], factor: float) -> None:
    """Sets every base learning rate to its own value times `factor`, and scales the current one accordingly.

    Args:
        optimizers: The optimizers to change.
        schedulers: Their schedulers, flat; stored base values are changed too.
        factor: The new factor, in (0, inf), which replaces the previous one.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            _multiply(group, factor)
    for scheduler in schedulers:
        if isinstance(scheduler, LRScheduler) and hasattr(scheduler, "base_lrs"):
            old = scheduler.base_lrs
            groups = scheduler.optimizer.param_groups[: len(old)]
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            if isinstance(scheduler, CyclicLR):
                bounds = zip(scheduler.max_lrs, old, scheduler.base_lrs, strict=True)
                scheduler.max_lrs = [top if not low else top / low * new for top, low, new in bounds]


def forget_factor(optimizers: Iterable[Optimizer]) -> None:
    """Removes the entries of `multiply_bases` from the groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key in (_FACTOR, _OWN):
                group.pop(key, None)


def _multiply(group: dict[str, Any], factor: float) -> None:
    base, present = float(group.setdefault("initial_lr", float(group["lr"]))), float(group["lr"])
    old, own = group.get(_FACTOR, 1.0), group.get(_OWN, base)
    if base != own * old:  # something else has lowered it since
        own = base / old
    group[_FACTOR], group[_OWN] = factor, own
    if factor == old:
        return
    _write(group, "initial_lr", own * factor)
    _write(group, "lr", own * factor if present == base else present / old * factor)
    for key in ("max_lr", "min_lr"):  # the bounds of OneCycleLR
        if key in group:
            _write(group, key, float(group[key]) / old * factor)


def _write(group: dict[str, Any], key: str, value: float) -> None:
    if isinstance(group[key], Tensor):
        group[key].fill_(value)  # in place, since captured graphs hold this tensor
    else:
        group[key] = value
