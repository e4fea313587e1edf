# SPDX-License-Identifier: Apache-2.0
"""Inputs that do not matter and labels that mean nothing: said if no other rule explains why a run learns nothing."""

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.rules.classes import is_dominated
from lightning_optkit.diagnostics.rules.outcome import outcome_of
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["constant_input", "input_ignored", "label_shuffle"]

_LEARNS_NOTHING = 0.2  # calibrated
_LEARNS_ALL = 0.95  # calibrated: see `outcome`
_NEARLY, _HOLDS = 0.9, 0.95  # calibrated: shares of the loss of a constant prediction
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
    return Verdict("input_ignored", None, cause, evidence, "look at what forward() is given and returns", 0, 0.7)


def label_shuffle(run: RunSeen) -> Verdict | None:
    """What is learned of the training labels does not hold for the validation data, and never has."""
    outcome = outcome_of(run)
    probes = [check.probe for check in run.checks if check.probe is not None]
    gains = [probe.permuted / probe.before - 1 for probe in probes[len(probes) // 2 :] if probe.before > 0]
    constants = [check.losses[0].constant for check in run.checks if len(check.losses) == 1]
    if len(probes) < _PROBES or not gains or not sum(gains) / len(gains) >= _MATTERS or len(run.validations) < 2:
        return None
    if outcome.has_diverged or not outcome.is_below(_LEARNS_ALL):
        return None
    if is_dominated(run):
        return None  # a validation with other frequencies has another constant
    if any(check.losses[0].is_summed for check in run.checks if len(check.losses) == 1):
        return None  # a validation may have other batches
    constant = sum(constants) / len(constants)
    learns_nothing = outcome.progress < _LEARNS_NOTHING and min(run.validations[-2:]) > _NEARLY * constant
    if not learns_nothing and not min(run.validations) > _HOLDS * constant:
        return None
    cause = "labels do not go with their inputs: what is learned by heart does not hold for other data"
    evidence = (
        f"validation loss {run.validations[-1]:.3g}, where {constant:.3g} is that of a constant prediction; exchanging "
        f"training inputs raised the loss by up to {max(gains):.1%}"
    )
    return Verdict(
        "label_shuffle", None, cause, evidence, "look at pairs of x and y where they are joined or shuffled", 0, 0.7
    )


def _gains_of_order(run: RunSeen) -> list[float] | None:
    """How much exchanged inputs raised the loss in the last half of the probes of a run that learns nothing."""
    outcome = outcome_of(run)
    if outcome.has_diverged or not outcome.is_below(_LEARNS_NOTHING):
        return None
    probes = [check.probe for check in run.checks if check.probe is not None]
    gains = [probe.permuted / probe.before - 1 for probe in probes[len(probes) // 2 :] if probe.before > 0]
    known = [gain for gain in gains if gain == gain]
    return known if len(known) >= _PROBES else None
