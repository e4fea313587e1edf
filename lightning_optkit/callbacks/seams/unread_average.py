# SPDX-License-Identifier: Apache-2.0
"""An average that an optimizer was given itself, in a run in which no callback evaluates it or saves it as weights."""

from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_optkit.averaging import LAWA
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.step import OnePassOptimizer

__all__ = ["warn_of_unread_averages"]

_TOLD = WeakSet[Optimizer]()  # several callbacks may ask in one run


def warn_of_unread_averages(trainer: pl.Trainer) -> None:
    """Warns, once for each optimizer, if it keeps an average that no WeightAveraging of the run takes.

    Args:
        trainer: The Trainer, at the start of the training.
    """
    callbacks: list[Any] = callbacks_of(trainer, object)
    if any(not isinstance(each.average, LAWA) for each in callbacks if _takes_averages(each)):
        return  # it is the one in the step: WeightAveraging raises for another, but for LAWA, which no step keeps
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, OnePassOptimizer) and optimizer.average is not None and optimizer not in _TOLD:
            _TOLD.add(optimizer)
            given = repr(optimizer.average)
            rank_zero_warn(
                f"{type(optimizer).__name__} keeps {given}, which nothing evaluates or saves as weights: add "
                f"WeightAveraging({given}) in place of average=, or read it by lightning_optkit.averaging.averages_of."
            )


def _takes_averages(callback: Any) -> bool:
    """By name, since the class itself imports this; Lightning's of that name has no `average`."""
    return hasattr(callback, "average") and any(cls.__name__ == "WeightAveraging" for cls in type(callback).__mro__)
