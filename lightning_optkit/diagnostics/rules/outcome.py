# SPDX-License-Identifier: Apache-2.0
"""Whether a run learns: what every rule with a threshold asks first, since nothing is wrong with a run that does.

Learning is measured against the best constant prediction: its loss is the entropy of the classes, or the variance of
the targets, so `progress` is 0 for a network that ignores its input and 1 for one without errors. It is known only for
a run with one loss function of torch per step, which is the loss of the step.
"""

import math
from dataclasses import dataclass

from lightning_optkit.diagnostics._observations import Check, RunSeen

__all__ = ["STEPS", "Outcome", "constant_of", "holds_below", "outcome_of"]

_DIVERGED = (
    10.0  # calibrated: times the constant prediction; with unscaled data healthy runs begin there, none ends there
)
STEPS, _SHARE = 48, 0.5  # a run is judged after so many steps and this share of what is planned


@dataclass(frozen=True)
class Outcome:
    """How far a run has come.

    Args:
        progress: 1 - loss / loss of the best constant prediction; NaN if unknown.
        has_diverged: Whether the loss is, or was before it became infinite, far above that of a constant.
        is_late: Whether it is late enough in the run to judge.
    """

    progress: float
    has_diverged: bool
    is_late: bool

    def is_below(self, progress: float) -> bool:
        """Whether it has diverged, or is late and has come less far."""
        return self.has_diverged or (self.is_late and self.progress < progress)


def outcome_of(run: RunSeen) -> Outcome:
    """Judges the losses so far."""
    is_late = run.is_over or run.steps >= max(STEPS, _SHARE * (run.steps_planned or 400))
    constant = constant_of(run)
    # After an infinite loss, what was before it counts; otherwise the last few are enough.
    known = run.losses.recent if run.nonfinite is not None else run.losses.last(16)
    finite = [loss for loss in known if math.isfinite(loss)]
    if math.isnan(constant) or not finite:
        return Outcome(math.nan, False, is_late)
    last = finite[-max(4, min(16, run.losses.num // 4)) :]
    progress = 1 - sum(last) / len(last) / constant
    if run.nonfinite is None:
        return Outcome(progress, is_late and progress < 1 - _DIVERGED, is_late)
    is_sudden = run.nonfinite.rise <= _DIVERGED and progress >= 1 - _DIVERGED
    is_broken = run.nonfinite.where == "batch" or is_sudden
    return Outcome(math.nan if is_broken else progress, not is_broken, is_late)


def holds_below(run: RunSeen, progress: float) -> bool:
    """Whether it is late and has come less far, in training or by its last validation loss, if there is one."""
    outcome = outcome_of(run)
    held = 1 - run.validations[-1] / constant_of(run) if run.validations else math.nan
    return outcome.is_below(progress) or (outcome.is_late and held < progress)


def constant_of(run: RunSeen) -> float:
    """The loss of the best constant prediction, over the measured steps; NaN if unknown."""
    constants = [_constant(check) for check in run.checks]
    known = [each for each in constants if math.isfinite(each) and each > 0]
    return sum(known) / len(known) if known and len(known) >= len(constants) / 2 else math.nan


def _constant(check: Check) -> float:
    """The loss of a constant prediction in a step that called one loss function."""
    return check.losses[0].constant if len(check.losses) == 1 else math.nan
