# SPDX-License-Identifier: Apache-2.0
"""A loss that begins far above that of a constant prediction: a hint of `optkit doctor`, since a batch gets over it."""

import math

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics._signals import LossSeen
from lightning_optkit.diagnostics.rules.outcome import constant_of, floor_of
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["high_start", "start_of"]

_FAR = 4.0  # calibrated: what healthy runs begin at is printed by tests/diagnostics/benchmark/starts.py
_FEW = 16  # theory: of fewer targets the variance is a quarter of the true one in over 0.2 % of batches
_BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits")


def start_of(run: RunSeen) -> float:
    """The first loss by that of the best constant prediction, or for classes of the one that prefers none, if that is
    larger; NaN if one of them is not known.

    Rare classes make the first of the two small, where a network that knows nothing yet has the second.
    """
    seen = run.checks[0].losses if run.checks else ()
    if len(seen) != 1 or not run.losses.first or not seen[0].constant > 0:  # NaN: not known
        return math.nan
    if seen[0].samples < _FEW and not math.isnan(seen[0].target_mean):
        return math.nan
    constant, floor = constant_of(run), floor_of(run)
    unsure = _of_no_preference(seen[0]) * constant / seen[0].constant  # a loss may be a multiple of torch's
    span = max(constant, unsure) - floor if not math.isnan(unsure) else math.nan
    return (run.losses.first[0] - floor) / span if span > 0 else math.nan


def high_start(run: RunSeen) -> Verdict | None:
    """Said of a run that begins at over four times the loss of such a prediction."""
    if not start_of(run) > _FAR:  # NaN: not known
        return None
    seen, first, constant = run.checks[0].losses, run.losses.first[0], constant_of(run)
    evidence = (
        f"the loss begins at {first:.3g}, where a constant prediction has {constant:.3g}; the first outputs have a "
        f"root mean square of {seen[0].output_rms:.3g}"
    )
    far_from = math.hypot(seen[0].target_mean, seen[0].target_std)
    if far_from > seen[0].output_rms:  # NaN: classes
        symptom = "unscaled_target"
        cause = "the targets are far from the first outputs, so that the first steps go into their mean and scale alone"
        evidence += f", the targets a mean of {seen[0].target_mean:.3g} and a deviation of {seen[0].target_std:.3g}"
        remedy = "y = (y - y_train.mean()) / y_train.std(), or the mean of the targets as first bias of the last layer"
    else:
        symptom = "bad_init_scale"
        cause = "the first outputs are too large, so that the first steps go into making them smaller"
        remedy = "smaller first weights of the last layer, or of the embedding that it shares: std=0.02"
    return Verdict(symptom, None, cause, evidence, remedy, 0, 0.9)


def _of_no_preference(seen: LossSeen) -> float:
    """The loss of equal probabilities; 0 for a regression, NaN where it is summed over the batch."""
    if not math.isnan(seen.target_mean):
        return 0.0
    if seen.is_summed:
        return math.nan
    return math.log(2 if seen.function in _BINARY else seen.classes)
