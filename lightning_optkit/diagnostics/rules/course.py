# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in the course of a run that has learned: overfitting."""

import math

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.rules.classes import is_dominated, missing_class
from lightning_optkit.diagnostics.rules.outcome import constant_of, outcome_of
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["overfitting"]

_SINCE = 3  # as usual: evaluations behind the best one, all of which must be worse
_LOST = 0.25  # judgement: share of what had been learned for other data that is lost again
_RISE = 0.1  # judgement: what is close to a constant prediction anyway must rise by so much of itself
_FITTED = 0.5  # judgement: the training loss has halved meanwhile, so it is not the training that went wrong
_HOLDS = 0.95  # otherwise nothing was ever learned that holds for other data: see `shuffled_or_weak`


def overfitting(run: RunSeen) -> Verdict | None:
    """While the training loss halved, the validation loss lost a quarter of what it had come below a constant."""
    constant, values, trained = constant_of(run), run.validations, run.trained
    if len(values) <= _SINCE or not all(map(math.isfinite, values)) or not constant > 0 or run.nonfinite is not None:
        return None
    best = min(range(len(values)), key=values.__getitem__)
    if best >= len(values) - _SINCE or not outcome_of(run).is_late or is_dominated(run):
        return None
    rise = min(values[-_SINCE:]) - values[best]
    if values[best] > _HOLDS * constant or rise < max(_LOST * (constant - values[best]), _RISE * values[best]):
        return None
    before, now = _mean(trained[max(0, best - 1) : best + 2]), _mean(trained[-_SINCE:])
    if not now < _FITTED * before:  # NaN: not known
        return None
    cause = "the network learns the training data by heart, and other data get worse since"
    evidence = (
        f"the validation loss was {values[best]:.3g} at evaluation {best + 1} of {len(values)} and is "
        f"{values[-1]:.3g}, where {constant:.3g} is that of a constant prediction; the training loss fell from "
        f"{before:.3g} to {now:.3g}"
    )
    monitor = "" if run.monitor == "val_loss" else f', monitor="{run.monitor}"'
    remedy = (
        f'ok.EarlyStoppingCriterion("GL", alpha=5.0{monitor}), which goes back to the best weights; more data, '
        "augmentation, dropout or weight decay"
    )
    if (missing := missing_class(run)) is not None:
        place, share, samples = missing
        cause = f"training seems to have no sample of class {place}, whose loss in the validation grows meanwhile"
        evidence += (
            f"; {share:.0%} of the validation are of class {place}, and none of the {samples:,} training samples"
        )
        evidence += " that were looked at"
        remedy = "sklearn.model_selection.train_test_split(..., stratify=y), or another split with each class in both"
    onset = (best + 1) * run.steps // len(values)
    return Verdict("overfitting", None, cause, evidence, remedy, onset, 0.8)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
