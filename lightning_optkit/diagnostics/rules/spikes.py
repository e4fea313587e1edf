# SPDX-License-Identifier: Apache-2.0
"""One batch after which all that was learned is lost; said only of a run that has not come back from it."""

import math
import statistics

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.rules.outcome import constant_of, outcome_of, typical_progress
from lightning_optkit.diagnostics.rules.rates import REPLACED, first_change
from lightning_optkit.diagnostics.rules.units import closed_later
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["loss_spike"]

_LEARNS, _LEARNS_WELL = 0.5, 0.9  # calibrated: see `outcome`; the second where units closed as well
_WINDOW = 32  # judgement: steps before it, the largest loss of which was normal
_TIMES = 10.0  # judgement: far outside of what batches differ by
_LOST, _LOST_BESIDE = 0.2, 0.05  # judgement: progress that it had made before, and that is gone; beside closed units


def loss_spike(run: RunSeen) -> Verdict | None:
    """A loss ten times as large as any of the 32 before it, in a run that had learned until then and has not since."""
    outcome, constant = outcome_of(run), constant_of(run)
    closed = closed_later(run)
    bound, least = (_LEARNS, _LOST) if closed is None else (_LEARNS_WELL, _LOST_BESIDE)
    if math.isnan(constant) or not outcome.is_below(bound) or first_change(run)[0] > REPLACED:
        return None  # a rate that was too high from the first steps on comes earlier
    losses = [*run.losses.recent]
    first = run.losses.num - len(losses)
    for place in range(_WINDOW, len(losses)):
        before, now = losses[place - _WINDOW : place], losses[place]
        if not (math.isfinite(now) and now > _TIMES * max(before)):
            continue
        progress = 1 - statistics.median(before) / constant
        if progress < _LOST or progress - max(outcome.progress, typical_progress(run)) < least:
            continue  # the mean may be that of another large loss, of targets with heavy tails
        step = first + place
        cause = "one batch threw the weights out of what they had learned, and they have not come back"
        evidence = (
            f"the loss of step {step} was {now:.3g}, the largest of the {_WINDOW} steps before it {max(before):.3g}; "
            f"{progress:.0%} of the loss of a constant prediction had been learned before"
        )
        if closed is not None:
            evidence += f"; {closed.closed_since:.0%} of the units of {closed.place} closed after the first step"
        remedy = f"ok.SpikeGuard(), which skips such a batch; and a look at the batch of step {step}"
        return Verdict("loss_spike", None, cause, evidence, remedy, step, 0.8)
    return None
