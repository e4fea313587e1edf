# SPDX-License-Identifier: Apache-2.0
"""Inputs that do not matter: said if no other rule explains why a run learns nothing."""

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.rules.outcome import floor_of, outcome_of
from lightning_optkit.diagnostics.rules.rates import decays_most
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["constant_input", "input_ignored"]

_LEARNS_NOTHING = 0.2  # calibrated
_PROBES = 3
_MATTERS = 0.01  # calibrated: share of the loss by which exchanged inputs raise it


def constant_input(run: RunSeen) -> Verdict | None:
    """All inputs of every measured batch were equal: exact, so it comes before all that has a threshold."""
    inputs = [check.first_input for check in run.checks if check.first_input is not None]
    if len(inputs) < _PROBES or not all(each.is_constant for each in inputs):
        return None
    cause, evidence = "every sample has the same input", f"the input of {inputs[0].layer} did not vary over a batch"
    return Verdict("input_ignored", inputs[0].layer, cause, evidence, "look at next(iter(loader))", 0, 1.0)


def input_ignored(run: RunSeen) -> Verdict | None:
    """Exchanging inputs among the samples changes nothing although training has gone on."""
    gains = _gains_of_order(run)
    if gains is None or max(gains) >= _MATTERS:
        return None
    cause = "the network predicts the same whatever its input: the input carries nothing, or does not reach the output"
    evidence = (
        f"exchanging inputs among samples changed the loss by at most {max(map(abs, gains)):.2%} in {len(gains)} probes"
    )
    remedy = "look at what forward() is given and returns"
    if (decay := decays_most(run)) is not None:
        cause = "the weight decay takes the weights to 0, so the network predicts the same whatever its input"
        evidence += f"; weight_decay={decay[0]:.3g} made up {decay[1]:.0%} of the gradients of the first steps"
        remedy = "weight_decay=0.01 or less, or AdamW, which does not add it to the gradient"
    return Verdict("input_ignored", None, cause, evidence, remedy, 0, 0.7)


def _gains_of_order(run: RunSeen) -> list[float] | None:
    """How much exchanged inputs raised the loss in the last half of the probes of a run that learns nothing."""
    outcome = outcome_of(run)
    if outcome.has_diverged or not outcome.is_below(_LEARNS_NOTHING):
        return None
    probes = [check.probe for check in run.checks if check.probe is not None]
    floor = floor_of(run)  # the entropy of soft targets is there whatever the order of the inputs
    above = [(probe.permuted - probe.before, probe.before - floor) for probe in probes[len(probes) // 2 :]]
    gains = [rise / excess for rise, excess in above if excess > 0]
    known = [gain for gain in gains if gain == gain]
    return known if len(known) >= _PROBES else None
