# SPDX-License-Identifier: Apache-2.0
"""Labels that do not go with their inputs in training but do so in the validation, or that hardly go with them at all.

Only the validation tells a signal that was destroyed from one that is weak: both look alike in training.
"""

import math
import statistics

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics._signals import AssociationSeen, TargetsSeen
from lightning_optkit.diagnostics.rules.classes import is_dominated
from lightning_optkit.diagnostics.rules.outcome import constant_of, is_multiple, outcome_of
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["label_shuffle", "shuffled_or_weak"]

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


def label_shuffle(run: RunSeen) -> Verdict | None:
    """Before anything was trained on twice, predictions told less of training targets than of validation ones.

    At the same weights neither has an advantage, so they differ by chance alone if both are drawn alike: be the signal
    weak or strong. Even of a network that has learned nothing, outputs tell much of targets that go with inputs.
    """
    fresh, held, targets = run.fresh, run.held, run.validated
    if not _is_judged(run) or fresh is None or held is None or targets is None or fresh.samples < _FEW:
        return None
    if min(run.validations) < (1 - _HELD) * targets.constant:
        return None
    if not abs(constant_of(run) - targets.constant) < _SAME * targets.constant:
        return None  # targets of another law
    found = _in_gain(fresh, held) or _in_dependence(fresh, held)
    if found is None:
        return None
    cause = "labels do not go with their inputs as those of the validation do"
    evidence = f"before the first validation, {found}; the validation loss is {_beside(run, targets)}"
    remedy = "look at pairs of x and y where the training data are joined or shuffled, beside those of the validation"
    return Verdict("label_shuffle", None, cause, evidence, remedy, 0, 0.85)


def shuffled_or_weak(run: RunSeen) -> Verdict | None:
    """Exchanged inputs cost training, but no validation loss was below that of a constant prediction.

    That a signal is weaker than so many samples show, or destroyed, is the same in law, so the cause has both.
    """
    if not _is_judged(run) or label_shuffle(run) is not None or is_multiple(run):
        return None
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
        "nothing that is learned holds for other data: labels do not go with their inputs, or these say too little "
        "about them; so many samples do not tell which"
    )
    best, last = min(run.validations), run.validations[-1]
    evidence = (
        f"validation loss {best:.4g} at best and {last:.4g} at last, where {constant:.4g} is that of a constant "
        f"prediction of {whose}, and chance makes {error:.2g} of difference; exchanging training "
        f"inputs raised the loss by up to {max(gains):.1%}"
    )
    remedy = (
        "more samples, or features that tell more: a linear model shows how much can be learned; and look at pairs of "
        "x and y where they are joined or shuffled"
    )
    return Verdict("label_shuffle", None, cause, evidence, remedy, 0, 0.5)


def _is_judged(run: RunSeen) -> bool:
    outcome = outcome_of(run)
    if outcome.has_diverged or not outcome.is_below(_LEARNS_ALL) or len(run.validations) < 2:
        return False
    return not is_dominated(run)  # a validation with other frequencies has another constant


def _in_gain(fresh: AssociationSeen, held: AssociationSeen) -> str | None:
    """By how much less loss predictions had with their own targets."""
    error = math.hypot(fresh.error, held.error)
    if not abs(held.gain - fresh.gain) > _BY_CHANCE * error or not abs(held.gain) > _BY_CHANCE * held.error:
        return None
    if fresh.scatter > 1 + _BY_CHANCE * math.sqrt(2 / max(fresh.batches, 1)):
        return None  # they did go with inputs, one way and another, as the weights went
    if fresh.gain / held.gain > _FOLLOWS:
        return None
    better = "less" if held.gain > 0 else "more"
    return (
        f"predictions had {abs(held.gain):.2g} {better} loss with their own targets than with exchanged ones in the "
        f"validation, and {fresh.gain:.2g} less in {fresh.samples} training samples that had not been trained on, "
        f"where chance makes {error:.2g} of difference"
    )


def _in_dependence(fresh: AssociationSeen, held: AssociationSeen) -> str | None:
    """By what linear functions of predictions tell of targets, in whatever direction."""
    one, other = fresh.dependence, held.dependence
    if one is None or other is None or other.deviates < _BY_CHANCE:
        return None  # nothing to be told, as far as so many samples show
    if one.deviates > _BY_CHANCE or fresh.gain > _BY_CHANCE * fresh.error:
        return None  # labels of training went with inputs, be it less: outputs turn while a network learns
    # As if both were of one strength: a noncentral chi-square has a variance of 2 (columns + 2 free strength).
    both = (one.strength * one.free + other.strength * other.free) / (one.free + other.free)
    variances = [2 * (each.columns + 2 * each.free * max(both, 0.0)) / each.free**2 for each in (one, other)]
    error = math.sqrt(sum(variances))
    if not other.strength - one.strength > _BY_CHANCE * error or one.strength > _FOLLOWS * other.strength:
        return None
    return (
        f"squared correlations of outputs with targets came to {other.strength:.2g} beyond chance in the validation, "
        f"and to {one.strength:.2g} in {fresh.samples} training samples that had not been trained on, where "
        f"chance makes {error:.2g} of difference"
    )


def _beside(run: RunSeen, targets: TargetsSeen) -> str:
    return f"{min(run.validations):.4g} at best, and {targets.constant:.4g} that of a constant prediction"


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
