# SPDX-License-Identifier: Apache-2.0
"""Whether a run learns: what every rule with a threshold asks first, since nothing is wrong with a run that does.

Learning is measured against the best constant prediction: its loss is the entropy of the classes, or the variance of
the targets, so `progress` is 0 for a network that ignores its input and 1 for one without errors. Of targets that are
probabilities, or smoothed, even that one has a loss, their own entropy, so it is left out of both. It is known only for
a run with one loss function of torch per step, which is the loss of the step, or the same multiple of it in each.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_optkit.diagnostics._observations import RunSeen

__all__ = [
    "STEPS",
    "Outcome",
    "constant_of",
    "floor_of",
    "holds_below",
    "is_multiple",
    "is_under_way",
    "judged",
    "outcome_of",
    "typical_progress",
]

_DIVERGED = (
    10.0  # calibrated: times the constant prediction; with unscaled data healthy runs begin there, none ends there
)
_ROUNDING = 1e-2  # of a loss in 16 bits
_BESIDE = 0.1  # judgement: `progress` that a small penalty moves it by at most
_VARY = 1e-6  # theory: of the loss of a constant; targets that vary less are all alike
STEPS, _SHARE = 48, 0.5  # a run is judged after so many steps and this share of what is planned
_UNDER_WAY = 0.25  # judgement: of what is planned; until then a part of the loss or of the module may be left out
_LENGTH = 400  # steps, where the length of the run is not known


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


@dataclass
class _Judged(RunSeen):
    bounds: tuple[float, float] = (math.nan, 0.0)
    outcome: Outcome | None = None


def judged(run: RunSeen) -> RunSeen:
    """The run, which need not be judged by each of the rules anew while nothing more is seen."""
    return _Judged(**vars(run), bounds=_bounds(run), outcome=outcome_of(run))


def outcome_of(run: RunSeen) -> Outcome:
    """Judges the losses so far."""
    if isinstance(run, _Judged) and run.outcome is not None:
        return run.outcome
    is_late = run.is_over or run.steps >= max(STEPS, _SHARE * (run.steps_planned or _LENGTH))
    constant, floor = _bounds(run)
    # After an infinite loss, what was before it counts; otherwise the last few are enough.
    known = run.losses.recent if run.nonfinite is not None else run.losses.last(16)
    last = _last_of(known, run.losses.num)
    if math.isnan(constant) or not last:
        return Outcome(math.nan, False, is_late)
    progress = _progress(sum(last) / len(last), constant, floor)
    if run.nonfinite is None:
        return Outcome(progress, is_late and progress < 1 - _DIVERGED, is_late)
    is_sudden = run.nonfinite.rise <= _DIVERGED and progress >= 1 - _DIVERGED
    is_broken = run.nonfinite.where == "batch" or is_sudden
    return Outcome(math.nan if is_broken else progress, not is_broken, is_late)


def is_under_way(run: RunSeen) -> bool:
    """Whether what is left out at its start would have joined."""
    return run.is_over or run.steps >= _UNDER_WAY * (run.steps_planned or _LENGTH)


def typical_progress(run: RunSeen) -> float:
    """That of the median of the last losses: of targets with heavy tails, a single batch can raise the mean."""
    last = _last_of(run.losses.last(16), run.losses.num)
    return _progress(statistics.median(last), *_bounds(run)) if last else math.nan


def _last_of(losses: Iterable[float], num: int) -> list[float]:
    """The last finite ones, a quarter of all so far, but 4 to 16."""
    return [loss for loss in losses if math.isfinite(loss)][-max(4, min(16, num // 4)) :]


def holds_below(run: RunSeen, progress: float) -> bool:
    """Whether it is late and has come less far, in training or by its last validation loss, if there is one."""
    outcome = outcome_of(run)
    held = _progress(run.validations[-1], *_bounds(run)) if run.validations else math.nan
    return outcome.is_below(progress) or (outcome.is_late and held < progress)


def constant_of(run: RunSeen) -> float:
    """The loss of the step for the best constant prediction, over the measured steps; NaN if unknown."""
    return _bounds(run)[0]


def floor_of(run: RunSeen) -> float:
    """The least loss of the step that any prediction could have."""
    return _bounds(run)[1]


def is_multiple(run: RunSeen) -> bool:
    """Whether the loss of the step is a multiple of that of torch; a validation may have another one."""
    return abs(_factor(run, *_called_bounds(run)) - 1) > _ROUNDING


def _bounds(run: RunSeen) -> tuple[float, float]:
    """The losses of the step for the best constant prediction, and the least that any prediction could have."""
    if isinstance(run, _Judged):
        return run.bounds
    constant, floor = _called_bounds(run)
    factor = _factor(run, constant, floor)
    return constant * factor, floor * factor


def _called_bounds(run: RunSeen) -> tuple[float, float]:
    """The same of the loss of torch; a constant of NaN if fewer than half of the measured steps called one function."""
    called = [check.losses[0] for check in run.checks if len(check.losses) == 1]
    known = [each for each in called if math.isfinite(each.constant) and each.constant > 0]
    if not known:
        return math.nan, 0.0
    constant, floor = (sum(values) / len(known) for values in zip(*((k.constant, k.floor) for k in known), strict=True))
    return constant if len(known) >= len(run.checks) / 2 else math.nan, floor


def _factor(run: RunSeen, constant: float, floor: float) -> float:
    """By which `training_step` multiplied the loss of torch, whose bounds are given; NaN if it is not that, nor that
    and a small penalty.
    """
    called = [(check.returned, check.losses[0].value) for check in run.checks if len(check.losses) == 1]
    pairs = [(loss, value) for loss, value in called if math.isfinite(loss) and math.isfinite(value)]
    beside = _BESIDE * (constant - floor)
    if all(abs(loss - value) <= max(_ROUNDING * abs(value), beside) for loss, value in pairs):
        return 1.0
    factors = [loss / value for loss, value in pairs if value > 0]
    is_same = len(factors) == len(pairs) and max(factors) - min(factors) <= _ROUNDING * abs(factors[0])
    return factors[0] if is_same and factors[0] > 0 else math.nan


def _progress(loss: float, constant: float, floor: float) -> float:
    """Which share of what can be learned has been; NaN if nothing can be, or it is unknown."""
    return 1 - (loss - floor) / (constant - floor) if constant - floor > _VARY * constant else math.nan
