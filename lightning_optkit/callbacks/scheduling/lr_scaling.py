# SPDX-License-Identifier: Apache-2.0
"""Multiplies the learning rates that schedules start from, beside whatever schedules them.

Each group remembers its factor and its own base value: so both are in every checkpoint of the optimizer, a group that
is added later is told from those that have their factor, and the factor 1 gives back the very number.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler

__all__ = ["forget_factor", "multiply_bases"]

_FACTOR, _OWN = "initial_lr_factor", "initial_lr_unscaled"


def multiply_bases(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], factor: float) -> None:
    """Makes every base learning rate its own value times `factor`, and the present one in proportion.

    Args:
        optimizers: Whose groups to change.
        schedulers: Of these optimizers, flat; those that keep base values have them changed.
        factor: In (0, inf), in place of the one before.
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
    """Takes what `multiply_bases` remembers out of the groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key in (_FACTOR, _OWN):
                group.pop(key, None)


def _multiply(group: dict[str, Any], factor: float) -> None:
    base, present = float(group.setdefault("initial_lr", float(group["lr"]))), float(group["lr"])
    old, own = group.get(_FACTOR, 1.0), group.get(_OWN, base)
    if base != own * old:  # lowered by something else since
        own = base / old
    group[_FACTOR], group[_OWN] = factor, own
    if factor == old:
        return
    _write(group, "initial_lr", own * factor)
    _write(group, "lr", own * factor if present == base else present / old * factor)
    for key in ("max_lr", "min_lr"):  # where OneCycleLR keeps its bounds
        if key in group:
            _write(group, key, float(group[key]) / old * factor)


def _write(group: dict[str, Any], key: str, value: float) -> None:
    if isinstance(group[key], Tensor):
        group[key].fill_(value)  # captured graphs hold on to the tensor
    else:
        group[key] = value
