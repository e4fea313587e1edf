# SPDX-License-Identifier: Apache-2.0
"""Where the rate that a range test suggests is to be written: which argument, of which groups."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch.optim.lr_scheduler import CyclicLR

from lightning_optkit.callbacks._steps_at_rates import bases_of
from lightning_optkit.callbacks.scheduling.existing_schedulers import schedulers_of
from lightning_optkit.diagnostics._rate_trials import TRAINED
from lightning_optkit.diagnostics.lr_range import LRRange, stands_alone

__all__ = ["RatePlace", "advice", "rate_places"]

_NAMED = 4  # groups, of which each is said


class RatePlace(NamedTuple):
    """A rate of the configuration, and the argument that it is of."""

    rate: float
    argument: str


def rate_places(trainer: pl.Trainer) -> list[RatePlace]:
    """Those of all groups, the largest first and each once. A scheduler with a `max_lr` leaves the optimizer's unused.

    Args:
        trainer: At the start of its fit.
    """
    cyclic = {
        id(group)
        for scheduler in schedulers_of(trainer)
        if isinstance(scheduler, CyclicLR)
        for group in scheduler.optimizer.param_groups
    }
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    found = {
        RatePlace(float(f"{base:.3g}"), _argument(group, id(group) in cyclic))
        for group, base in zip(groups, bases_of(trainer), strict=True)
    }
    return sorted(found, reverse=True)


def _argument(group: dict[str, Any], is_cyclic: bool) -> str:
    if is_cyclic:
        return "max_lr of CyclicLR"
    return "max_lr of OneCycleLR" if {"max_lr", "min_lr"} <= group.keys() else "the rate of the optimizer"


def advice(found: LRRange, chosen: str, places: Sequence[RatePlace]) -> str:
    """The last line: which rate to use, and where.

    Args:
        found: What the test has found; its rates are those of the group with the largest.
        chosen: The rule.
        places: Of `rate_places`, at least one.
    """
    if stands_alone(found.suggestions, chosen):
        return (
            f"The rules are far apart, and {chosen} is more than 10 times from the others: --suggestion {TRAINED} "
            f'decides, in a run LRFinder(suggestion="{TRAINED}").'
        )
    rate, (first, *others) = found.suggestions[chosen], places
    assert rate is not None
    said = f"Use {rate:.3g}, by {chosen}, as {first.argument}"
    if not others:
        return f"{said}."
    said += f" for the group of {first.rate:.3g}"
    if len(others) >= _NAMED:
        return f"{said}, and for the {len(others)} other rates {rate / first.rate:.3g} times what they are."
    for each in others:
        where = "" if each.argument == first.argument else f" as {each.argument}"
        said += f", {rate * each.rate / first.rate:.3g}{where} for that of {each.rate:.3g}"
    return f"{said}."
