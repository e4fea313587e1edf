# SPDX-License-Identifier: Apache-2.0
"""A rate that is likely to train where another one is far too high, from the first step alone.

Whatever the rate was, the first step begins at the initial weights, and is in proportion to it: so it tells which rate
would have made a step of a usual size, however far off the given one is. Later steps are those of a run that is lost.
"""

import math
import statistics

from lightning_optkit.diagnostics._observations import Check, RunSeen

__all__ = ["likely_rate"]

_USUAL = 0.03  # calibrated: change of the median matrix by the first step of a run that learns well, with Adam
_USUAL_OF_GRADIENT = 0.02  # calibrated: the same where the step is the rate times the gradient
_FALL = 0.1  # calibrated: share of the loss that such a step takes away, were the loss a straight line
_AT_ZERO = 0.1  # judgement: a gain far below what any initialization uses
_MOMENTUM = 0.99
_PROPORTIONAL = 3.0  # theory: rate times gradient, or 1.9 times that with Nesterov's momentum; Adam's is far more


def likely_rate(run: RunSeen) -> float:
    """The rate; NaN where the first step, or the weights before it, are not known."""
    first = run.checks[0] if run.checks and run.checks[0].step == 0 else None
    if first is None or not first.rate > 0:
        return math.nan
    change = _change(first)
    if not change > 0:
        return math.nan
    own = [p for p in first.parameters if p.is_optimized]
    gradient, update = math.hypot(*(p.grad_norm for p in own)), math.hypot(*(p.update_norm for p in own))
    if not update < _PROPORTIONAL * first.rate * gradient:
        return first.rate * _USUAL / change
    rate = first.rate * _USUAL_OF_GRADIENT / change
    loss = run.losses.first[0] if run.losses.first else math.nan
    if loss > 0 and math.isfinite(loss):
        rate = min(rate, _FALL * loss / gradient**2)
    # Between what momentum adds along one direction, and what it leaves as it is: the curvature that it bears.
    return rate * math.sqrt(1 - min(first.momentum, _MOMENTUM))


def _change(first: Check) -> float:
    """Norm of the first update by that of the weight before it, in the median of the matrices; NaN if unknown."""
    norms = {layer.name: layer.weight_norm for layer in first.layers if layer.gain > _AT_ZERO}
    known = [
        p.update_norm / norms[p.layer]
        for p in first.parameters
        if p.name.endswith(".weight") and norms.get(p.layer, 0.0) > 0 and math.isfinite(p.update_norm)
    ]
    return statistics.median_low(known) if known else math.nan
