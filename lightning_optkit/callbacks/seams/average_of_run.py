# SPDX-License-Identifier: Apache-2.0
"""An average in terms of a run: the step at which it starts, and whether the run is long enough for it."""

import math
from dataclasses import replace

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.averaging import EMA, LAWA, SWA, PowerEMA
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.diagnostics._observations import AverageSeen
from lightning_optkit.step import OnePassOptimizer
from lightning_optkit.step.numbers import starts_at_a_step

__all__ = ["AnyAverage", "average_of_run", "averages_too_long", "warn_if_too_long"]

AnyAverage = EMA | PowerEMA | SWA | LAWA


def average_of_run(average: AnyAverage, run: Run) -> AnyAverage:
    """The same average with its start as a step of the run.

    Raises:
        ValueError: if the length of the run, or of an epoch, is unknown.
    """
    if starts_at_a_step(average):
        return average
    if average.start_interval == "step":
        steps = run.steps_at_end()
        return average.for_run(math.inf if steps is None else steps)
    before = run.steps_before(int(average.start) - 1)
    if before is None:
        return average.for_run(math.inf)  # raises
    return replace(average, start=before + 1, start_interval="step")


def warn_if_too_long(owner: str, trainer: pl.Trainer, average: AnyAverage) -> None:
    """Warns if an exponential average reaches back over more steps than it will see.

    Args:
        owner: The callback.
        trainer: The Trainer, at the start of the training.
        average: The average, with its start as a step.
    """
    seen = _too_long(trainer, average)
    if seen is not None:
        rank_zero_warn(
            f"{owner}({seen.text}): the average reaches back over {seen.reach:,.0f} steps, but sees {seen.steps:,}, so "
            f"that {seen.share_of_first:.0%} of it are the first weights; {seen.fitting} fits this run, and so does "
            "warmup='power'."
        )


def averages_too_long(trainer: pl.Trainer) -> list[AverageSeen]:
    """Those of the one-pass optimizers and of WeightAveraging, if they are too long for the run.

    Args:
        trainer: The Trainer, at the start of the training.
    """
    folded = [each.average for each in trainer.optimizers if isinstance(each, OnePassOptimizer)]
    given = [getattr(each, "average", None) for each in callbacks_of(trainer, Callback)]
    averages = dict.fromkeys(each for each in (*folded, *given) if isinstance(each, EMA))
    starting = [average_of_run(average, Run(trainer)) for average in averages]
    found = [_too_long(trainer, average) for average in dict.fromkeys(starting)]
    return [each for each in found if each is not None]


def _too_long(trainer: pl.Trainer, average: AnyAverage) -> AverageSeen | None:
    run = Run(trainer)
    steps = run.steps_at_end()
    is_scheduled = any(getattr(callback, "name", None) == "average_decay" for callback in callbacks_of(trainer, object))
    if not isinstance(average, EMA) or average.warmup or is_scheduled or run.is_trial or steps is None:
        return None
    seen, reach = steps - int(average.start) + 1, average.every / (1 - average.decay)
    if not 0 < seen < reach:
        return None
    first = average.decay ** ((seen - 1) // average.every)
    fitting = replace(average, decay=1 - float(f"{min(10 * average.every / seen, 0.5):.1g}"))
    return AverageSeen(repr(average), reach, seen, first, repr(fitting))
