# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in the course of a run that has learned: overfitting."""

import math
import statistics

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.rules.outcome import constant_of
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["overfitting"]

_SINCE, _RISE, _OF_CONSTANT = 3, 0.25, 0.5  # three evaluations: as usual; the others: calibrated


def overfitting(run: RunSeen) -> Verdict | None:
    """The validation loss has risen for three evaluations by a quarter, while the training loss fell on."""
    constant, values = constant_of(run), run.validations
    if len(values) < _SINCE + 2 or not all(map(math.isfinite, values)) or not constant > 0 or run.nonfinite is not None:
        return None
    best = min(range(len(values)), key=values.__getitem__)
    behind = values[-_SINCE:]
    if best >= len(values) - _SINCE or min(behind) <= (1 + _RISE) * values[best]:
        return None
    last = run.losses.last(max(1, len(run.losses.recent) // 8))
    is_fitted = statistics.fmean(last) < 0.5 * min(behind)  # it knows the training data far better
    if not is_fitted or min(behind) - values[best] < _OF_CONSTANT * constant:
        return None
    cause = "the network learns the training data by heart: other data get worse since"
    evidence = (
        f"validation loss {values[-1]:.3g}, after {values[best]:.3g} at evaluation {best + 1} of {len(values)}; "
        f"training loss {statistics.fmean(last):.3g}"
    )
    remedy = 'EarlyStoppingCriterion("GL", alpha=5.0), more data, augmentation, dropout or weight decay'
    onset = best * run.steps // len(values)
    return Verdict("overfitting", None, cause, evidence, remedy, onset, 0.8)
