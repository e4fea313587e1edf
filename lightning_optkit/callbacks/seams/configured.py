# SPDX-License-Identifier: Apache-2.0
"""The optimizers and schedulers in the value of `configure_optimizers`, in any of its forms."""

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = ["optimizers_in", "schedulers_in"]


def optimizers_in(configured: Any) -> Iterator[Optimizer]:
    """The optimizers."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, dict):
        yield from optimizers_in(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for item in configured:
            yield from optimizers_in(item)


def schedulers_in(configured: Any) -> Iterator[LRScheduler]:
    """The schedulers."""
    if isinstance(configured, LRScheduler | ReduceLROnPlateau):
        yield configured
    elif isinstance(configured, dict):
        for item in configured.values():
            yield from schedulers_in(item)
    elif isinstance(configured, list | tuple):
        for item in configured:
            yield from schedulers_in(item)
    elif hasattr(configured, "scheduler"):  # an LRSchedulerConfig
        yield from schedulers_in(configured.scheduler)
