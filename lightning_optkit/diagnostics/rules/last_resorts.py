# SPDX-License-Identifier: Apache-2.0
"""Inputs that do not matter and labels that mean nothing: said if no other rule explains why a run learns nothing."""

import math
import statistics

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.rules.classes import is_dominated
from lightning_optkit.diagnostics.rules.outcome import constant_of, outcome_of
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["constant_input", "input_ignored", "label_shuffle"]

_LEARNS_NOTHING = 0.2  # calibrated
_LEARNS_ALL = 0.95  # calibrated: see `outcome`
_CHANCE = 2.0  # theory: standard errors by which a validation loss is below a constant by chance, at most
_ERRORS = 1.5  # calibrated: of the last validation loss, in standard errors
_UNSEEN = 0.07  # theory: the variance of 400 normal targets has such a standard error
_UNSEEN_SHARES = 0.02  # judgement: entropies of the shares of classes differ less
_BY_CHANCE = 3.0  # theory: standard errors
_FEW = 100  # judgement: training samples, of which the network that is being trained may have met odd ones by chance
_FOLLOWS = 1 / 3  # judgement: while the network learns, training batches before a validation go less well with it
_HELD = 0.2  # judgement: progress on other data, above which labels have taught what they had to
_SAME = 0.2  # judgement: share by which the constants of training and validation differ at most
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
    if outcome.has_diverged or not outcome.is_below(_LEARNS_ALL) or len(run.validations) < 2:
        return None
    if is_dominated(run):
        return None  # a validation with other frequencies has another constant
    return _differs_from_validation(run) or _does_not_hold(run)


def _differs_from_validation(run: RunSeen) -> Verdict | None:
    """Before anything was trained on twice, predictions went otherwise with training targets than with validation ones.

    At the same weights neither has an advantage, so they differ by chance alone if both are drawn alike: be the signal
    weak or strong.
    """
    fresh, held, targets, constant = run.fresh, run.held, run.validated, constant_of(run)
    if fresh is None or held is None or targets is None or fresh.samples < _FEW:
        return None
    error = math.hypot(fresh.error, held.error)
    if not abs(held.gain - fresh.gain) > _BY_CHANCE * error or not abs(held.gain) > _BY_CHANCE * held.error:
        return None
    if fresh.scatter > 1 + _BY_CHANCE * math.sqrt(2 / max(fresh.batches, 1)):
        return (
            None  # they did go with inputs, one way and another, as the weights went: those of the validation are one
        )
    if fresh.gain / held.gain > _FOLLOWS or min(run.validations) < (1 - _HELD) * targets.constant:
        return None
    if not abs(constant - targets.constant) < _SAME * targets.constant:
        return None  # targets of another law
    cause = "labels do not go with their inputs as those of the validation do"
    better = "less" if held.gain > 0 else "more"
    evidence = (
        f"before the first validation, predictions had {abs(held.gain):.2g} {better} loss with their own targets than "
        f"with exchanged ones in the validation, and {fresh.gain:.2g} less in {fresh.samples} training samples that "
        f"had not been trained on, where chance makes {error:.2g} of difference; the validation loss is "
        f"{min(run.validations):.4g} at best, and {targets.constant:.4g} that of a constant prediction"
    )
    remedy = "look at pairs of x and y where the training data are joined or shuffled, beside those of the validation"
    return Verdict("label_shuffle", None, cause, evidence, remedy, 0, 0.85)


def _does_not_hold(run: RunSeen) -> Verdict | None:
    """Exchanged inputs cost training, but no validation loss was below that of a constant prediction."""
    probes = [check.probe for check in run.checks if check.probe is not None]
    gains = [probe.permuted / probe.before - 1 for probe in probes[len(probes) // 2 :] if probe.before > 0]
    if len(probes) < _PROBES or not gains or not sum(gains) / len(gains) >= _MATTERS:
        return None
    if run.fresh is not None and run.fresh.gain > _BY_CHANCE * run.fresh.error:
        return None  # labels went with inputs that had not been trained on
    if any(check.losses[0].is_summed for check in run.checks if len(check.losses) == 1):
        return None  # a validation may have other batches
    constant, error, whose = _held_to(run, gains)
    if not (min(run.validations) > constant - _CHANCE * error and run.validations[-1] > constant + _ERRORS * error):
        return None  # below it by more than chance, be it once: something that was learned does hold
    cause = (
        "what is learned does not hold for other data: labels do not go with their inputs, or these say too little "
        "about them to be told from noise"
    )
    best, last = min(run.validations), run.validations[-1]
    evidence = (
        f"validation loss {best:.4g} at best and {last:.4g} at last, where {constant:.4g} is that of a constant "
        f"prediction of {whose}, and chance makes {error:.2g} of difference; exchanging training "
        f"inputs raised the loss by up to {max(gains):.1%}"
    )
    remedy = (
        "look at pairs of x and y where they are joined or shuffled; if they are right, a linear model shows how much "
        "can be learned"
    )
    return Verdict("label_shuffle", None, cause, evidence, remedy, 0, 0.7)


def _held_to(run: RunSeen, gains: list[float]) -> tuple[float, float, str]:
    """The loss of a constant prediction on the validation data, the error of a comparison with it, whose targets."""
    seen = run.validated
    if seen is not None:
        # Both are of the same samples, so chance has a hand only in what predictions differ by. In log-likelihood, that
        # has a variance of twice the mean by which they help, and exchanged inputs cost both (for small differences).
        gain = max(sum(gains) / len(gains), 0.0) * seen.constant
        variance = 2 * seen.constant * gain if seen.is_squared else gain
        return seen.constant, math.sqrt(variance / seen.samples), "its targets"
    losses = [check.losses[0] for check in run.checks if len(check.losses) == 1]
    constants = [loss.constant for loss in losses]
    spread = statistics.stdev(constants) if len(constants) > 1 else math.inf
    # How many samples the validation has is not known, nor what they are.
    unseen = _UNSEEN_SHARES if math.isnan(losses[0].target_std) else _UNSEEN
    mean = statistics.fmean(constants)
    return mean, max(spread / math.sqrt(len(constants)), unseen * mean), "training targets"


def _gains_of_order(run: RunSeen) -> list[float] | None:
    """How much exchanged inputs raised the loss in the last half of the probes of a run that learns nothing."""
    outcome = outcome_of(run)
    if outcome.has_diverged or not outcome.is_below(_LEARNS_NOTHING):
        return None
    probes = [check.probe for check in run.checks if check.probe is not None]
    gains = [probe.permuted / probe.before - 1 for probe in probes[len(probes) // 2 :] if probe.before > 0]
    known = [gain for gain in gains if gain == gain]
    return known if len(known) >= _PROBES else None
