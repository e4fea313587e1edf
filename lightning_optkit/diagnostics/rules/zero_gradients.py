# SPDX-License-Identifier: Apache-2.0
"""Gradients that arrive, and are all exactly 0: the loss has a graph, and no number of it depends on a parameter."""

import math

from lightning_optkit.diagnostics._observations import Check, RunSeen
from lightning_optkit.diagnostics.rules.outcome import is_under_way, outcome_of
from lightning_optkit.diagnostics.verdict import ONCE, Verdict

__all__ = ["is_flat", "zero_gradients"]

_STEPS, _LOOKS = 20, 4  # as of parameters without a gradient: a mask is empty for so long once in a million runs
_LEARNED = 0.95  # theory: a loss that is 0 since nothing is left to learn has no gradient either
_CLOSED = 0.5  # units behind which a gradient is 0 have rules of their own


def zero_gradients(run: RunSeen) -> Verdict | None:
    """Every gradient of every parameter was 0 in every measured step from the first on.

    A loss of 0 is one of any weights where the function of torch that it comes from gave another number, or where it is
    0 for weights of 0 and for drawn ones too; else it may be that of samples that are right. It is one of this part of
    the run where others are not 0, or while the run is young: a term may be weighted by 0 at first. Any other loss may
    be flat where it is, behind a saturated output say: it is left to the rules of that until the run is judged.
    """
    checks = run.checks
    if run.steps < _STEPS or len(checks) < _LOOKS or checks[0].step != 0 or not all(map(is_flat, checks)):
        return None
    if any(_is_learned(check) for check in checks) or any(a.closed > _CLOSED for a in checks[0].activations):
        return None
    returned, is_lost = [check.returned for check in checks], all(map(_is_lost, checks))
    if is_lost and (any(run.losses.first) or any(run.losses.recent) or not is_under_way(run)):
        return None
    if not is_lost and (0 in returned or not outcome_of(run).is_late):
        return None
    steps = f"{len(checks)} measured steps of {run.steps:,}"
    evidence = f"all gradients of {len(checks[-1].parameters)} parameters were exactly 0 in {steps}"
    if is_lost:
        cause = "the loss is 0 whatever the weights are: it is multiplied by 0, or a mask leaves nothing of it"
        values = [each.value for check in checks for each in check.losses if math.isfinite(each.value)]
        evidence += ", and so was the loss"
        if any(values):
            evidence += f", where F.{checks[-1].losses[-1].function} gave {values[-1]:.3g}"
        remedy = "look at what the loss is multiplied by, and at mask.sum() of the first batch"
    else:
        cause = (
            "the loss does not change with any weight: what depends on them is multiplied by 0, rounded or cut off, or "
            "all weights on the way are 0"
        )
        if math.isfinite(returned[-1]):
            evidence += f", at a loss of {returned[-1]:.3g}"
        remedy = "compute the loss from the output without detach(), round(), sign() or clamp(); look at its factors"
    return Verdict("no_gradient", None, cause, evidence, remedy, 0, ONCE)  # so far: a gradient withdraws it


def is_flat(check: Check) -> bool:
    """Whether every gradient was exactly 0."""
    optimized = [p for p in check.parameters if p.is_optimized]
    return bool(optimized) and not any(p.has_gradient for p in check.parameters)


def _is_lost(check: Check) -> bool:
    """Whether the loss is 0, and would be so for other weights."""
    values = [each.value for each in check.losses]
    is_of_others = bool(values) and all(math.isfinite(value) and value != 0 for value in values)
    return check.returned == 0 and (is_of_others or check.of_drawn_weights == 0)


def _is_learned(check: Check) -> bool:
    """Whether the loss of torch is about as low as it can be: a sample that is right has a gradient of 0."""
    return any(
        seen.constant - seen.floor > 0 and 1 - (seen.value - seen.floor) / (seen.constant - seen.floor) > _LEARNED
        for seen in check.losses
    )
