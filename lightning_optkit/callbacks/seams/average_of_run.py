# SPDX-License-Identifier: Apache-2.0
"""An average in terms of a run: the step at which it starts, and whether the run is long enough for it."""

import math
from dataclasses import replace

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.averaging import EMA, LAWA, SWA, PowerEMA
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.step.numbers import starts_at_a_step

__all__ = ["AnyAverage", "average_of_run", "warn_if_too_long"]

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
    run = Run(trainer)
    steps = run.steps_at_end()
    is_scheduled = any(getattr(callback, "name", None) == "average_decay" for callback in callbacks_of(trainer, object))
    if not isinstance(average, EMA) or average.warmup or is_scheduled or run.is_trial or steps is None:
        return
    seen, reach = steps - int(average.start) + 1, average.every / (1 - average.decay)
    if 0 < seen < reach:
        first = average.decay ** ((seen - 1) // average.every)
        fitting = replace(average, decay=1 - float(f"{min(10 * average.every / seen, 0.5):.1g}"))
        rank_zero_warn(
            f"{owner}({average!r}): the average reaches back over {reach:,.0f} steps, but sees {seen:,}, so that "
            f"{first:.0%} of it are the first weights; {fitting!r} fits this run, and so does warmup='power'."
        )
