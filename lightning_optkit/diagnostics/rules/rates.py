# SPDX-License-Identifier: Apache-2.0
"""Learning rates, from the loss along the updates themselves and from how much the first ones change the weights."""

import math
import statistics
from collections.abc import Set
from operator import gt

from lightning_optkit.diagnostics._observations import Check, RunSeen
from lightning_optkit.diagnostics._signals import ProbeSeen
from lightning_optkit.diagnostics.rules.lower_rate import likely_rate
from lightning_optkit.diagnostics.rules.outcome import STEPS, outcome_of
from lightning_optkit.diagnostics.rules.units import closed_later
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["REPLACED", "decays_most", "first_change", "lr_too_high", "lr_too_low"]

_LEARNS, _LEARNS_WELL = 0.5, 0.9  # calibrated: see `outcome`
REPLACED = 0.3  # calibrated: a step that changes a matrix by so much of itself replaces what it has learned
_CLOSES = 0.1  # calibrated: the same, if units were closed as well
_RISEN = 3.0  # judgement: times the loss of a constant, and of the first step
_UNTOLD = 0.9  # theory: the norm is that after the step, so how much larger a step was cannot be told
_MOSTLY = 0.5  # judgement: of the change of a matrix
_DECAYS = 0.85  # judgement: of the sum with the gradient, which is then less than two thirds of it
_DECAY = 0.01  # the default of torch's AdamW
_USUAL = 0.03  # calibrated: change of a matrix by a first step of a run that learns well
_FAR = 0.01  # judgement: of the rate; a warm-up would not do
_FIRST_STEPS = 6
_AT_ZERO = 0.1  # judgement: a gain far below what any initialization uses
_NO_WAY = 1e-3  # theory: so little of a matrix changes what it computes by as little
_PROBES = 3
_LEVELS = 0.4  # judgement: at a rate that is far too low the loss falls in a straight line
_ROUNDED = 0.02  # theory: gradients in 16 bits have 8 of them
_MOMENTUM = 20.0  # judgement: 1 / (1 - 0.95); an update that is scaled by past gradients is far larger than a cut one
_BARELY = 0.2  # calibrated: progress
_QUARTER, _ERRORS = 20, 3.0  # theory: three standard errors of the difference of two means of so many losses
_TOO_FAR, _TOO_SHORT = 0.5, 0.8  # shares of the probes; theory: at the edge of stability one step in a few overshoots


def lr_too_high(run: RunSeen) -> Verdict | None:
    """The loss diverges, first updates replace weights or close units, or most overshoot where a tenth would not."""
    outcome, closed = outcome_of(run), closed_later(run)
    if not outcome.is_below(_LEARNS if closed is None else _LEARNS_WELL):
        return None
    change, worst = first_change(run)
    found = _too_large(run, change, worst, closed is not None)
    if found is None:
        return None
    cause, evidence = found
    if closed is not None:
        what = "ReLUs" if closed.function == "relu" else f"{closed.function} units"
        evidence += f"; {closed.closed_since:.0%} of the {what} of {closed.place} were closed after the first step"
    likely, highest = likely_rate(run), _highest(run)
    share = min(0.1, likely / highest if likely > 0 else _USUAL / max(change, _USUAL))
    lower = f"lr={highest * share:.1g}"
    remedy = f"{lower}, or a warm-up: ok.LRSchedule(ok.schedules.warmup_cosine(warmup=0.05))"
    if likely < _FAR * highest:  # so far away that an estimate may be wrong by some times
        remedy = f"{lower}, by the first step, or ok.LRFinder(), which measures one"
    elif change > _UNTOLD and not likely > 0:
        remedy = f"ok.LRFinder(), which measures one, or {lower} or less"
    decay = _decay_of(run, worst) if change > _CLOSES else 0.0
    if decay > 1.01 * _DECAY * highest and _MOSTLY < decay / change < 1 / _MOSTLY:
        cause = f"the weight decay takes away {decay:.0%} of the weights in a step"
        evidence += f"; rate times weight_decay is {decay:.2g}"
        remedy = f"weight_decay={_DECAY:g}, or a rate that is lower by as much"
    summed = [check.losses[0] for check in run.checks if len(check.losses) == 1 and check.losses[0].is_summed]
    if summed and len(summed) == len(run.checks):
        cause += ", since the loss is a sum over the batch, and its gradient as many times larger"
        remedy = f'reduction="mean" in F.{summed[0].function}, or {lower}'
    return Verdict("lr_too_high", None, cause, evidence, remedy, worst if change > _CLOSES else 0, 0.85)


def _decay_of(run: RunSeen, step: int) -> float:
    return next((check.decay for check in run.checks if check.step == step), 0.0)


def _too_large(run: RunSeen, change: float, worst: int, closes: bool) -> tuple[str, str] | None:
    """Cause and evidence, given the largest change of the first steps, where it was, and whether units closed."""
    outcome, step = outcome_of(run), f"step {worst} changed the median matrix by {change:.2g} of its norm"
    if outcome.has_diverged or _rises(run):
        evidence = f"the loss ends far above that of a constant prediction, at a rate of {_highest(run):.3g}"
        return "training diverges", f"{evidence}; {step}" if change > 0 else evidence
    if change > REPLACED:
        return "updates are so large that they replace what the weights have learned", step
    if not outcome.is_below(_LEARNS):
        return None
    probes = [check.probe for check in run.checks if check.probe is not None]
    far = sum(_overshoots(probe) for probe in probes)
    if len(probes) >= _PROBES and far >= _TOO_FAR * len(probes):
        evidence = f"{far} of {len(probes)} probed updates raised the loss of the batch that they were made from"
        return "updates overshoot: the loss of their own batch rises, where a tenth of them would lower it", evidence
    if closes and change > _CLOSES:
        return "the first updates were so large that they closed units for good", step
    return None


def _rises(run: RunSeen) -> bool:
    """Whether it ends far above a constant prediction, and above where it began."""
    outcome = outcome_of(run)
    if not (outcome.is_late and outcome.progress < 1 - _RISEN):
        return False
    return min(run.losses.last(4)) > _RISEN * run.losses.first[0]


def _highest(run: RunSeen) -> float:
    return max((check.rate for check in run.checks if math.isfinite(check.rate)), default=math.nan)


def lr_too_low(run: RunSeen) -> Verdict | None:
    """Thirty times the update would still have lowered the loss, in nearly all probes at the full rate."""
    outcome = outcome_of(run)
    bound = _LEARNS if run.steps >= STEPS else _BARELY  # the first steps of any run point far
    if outcome.has_diverged or not outcome.is_below(bound):
        return None
    stands = (way := _way(run)) < _NO_WAY  # so that it has learned nothing, whatever a validation does
    if not stands and (_learns_by_heart(run) or _has_found_it(run)):
        return None
    if not run.is_over and (len(run.validations) == 1 or _will_learn(run, bound)):
        return None  # the next validation tells whether other data gain
    if decays_most(run) is not None:
        return None  # weights go to 0 at any rate
    rate = _highest(run)
    if not run.is_over and rate < 0.5 * max(check.rate_to_come for check in run.checks):
        return None  # of a warm-up
    probes = [c.probe for c in run.checks if c.probe is not None and c.probe.rate >= 0.5 * rate]
    goes_on = _still_falls(run)
    short = sum(_falls_short(probe) and (goes_on or _helps_others(probe)) for probe in probes)
    cause = "updates are far too small for the loss to fall within the run"
    remedy = f"ok.LRFinder(), which measures one, or lr={30 * rate:.1g}"
    if len(probes) >= _PROBES and short >= _TOO_SHORT * len(probes):
        evidence = f"30 times the update would have lowered the loss further in {short} of {len(probes)} probes"
        evidence += f", at {rate:.3g}" + ("; the loss still falls, by more than batches differ" if goes_on else "")
    elif stands:
        evidence = f"at {rate:.3g}, {run.steps:,} steps changed the median matrix by {way:.1g} of its norm at most"
        remedy = "ok.LRFinder(), which measures one; and a look at what the loss is multiplied by"
    else:
        return None
    if _is_cut(run):
        cause = f"gradients are cut to a norm of {run.clip:.3g}, so updates are far too small for the loss to fall"
        evidence += f"; the norm of the gradients was {run.clip:.3g} in all of {len(run.checks)} measured steps"
        remedy = f"gradient_clip_val={30 * (run.clip or 0):.1g} in the Trainer, or none; its norm before the clip tells"
    return Verdict("lr_too_low", None, cause, evidence, remedy, 0, 0.85)


def first_change(run: RunSeen) -> tuple[float, int]:
    """The largest change of the median matrix by one of the first steps, in shares of its norm, and that step."""
    initialized = _initialized(run)
    return max(((_change(check, initialized), check.step) for check in run.checks), default=(0.0, 0))


def _change(check: Check, initialized: Set[str]) -> float:
    """Norm of the update by that of the weight, in the median of these layers; 0 for a later step."""
    change = _of_norm(check, initialized) if check.step < _FIRST_STEPS else math.nan
    return change if math.isfinite(change) else 0.0


def _of_norm(check: Check, initialized: Set[str]) -> float:
    """The same for any step; NaN if unknown."""
    seen = [p for p in check.parameters if p.layer in initialized and p.name.endswith(".weight") and p.weight_norm > 0]
    known = [p.update_norm / p.weight_norm for p in seen if math.isfinite(p.update_norm)]
    return statistics.median_low(known) if known else math.nan


def _initialized(run: RunSeen) -> set[str]:
    """Layers that did not start at about 0, from where every step is a large one (zero heads, LoRA)."""
    first = run.checks[0] if run.checks and run.checks[0].step == 0 else None
    return set() if first is None else {layer.name for layer in first.layers if layer.gain > _AT_ZERO}


def decays_most(run: RunSeen) -> tuple[float, float] | None:
    """The weight decay that is added to the gradient, and its share of the sum, if it is nearly all of it: in the
    median of the first steps, since weights that have come to 0 decay no longer.
    """
    shares = [_share_of_decay(check) for check in run.checks if check.step < _FIRST_STEPS]
    known = [share for share in shares if math.isfinite(share)]
    share = statistics.median_low(known) if known else 0.0
    return (max(check.added for check in run.checks), share) if share > _DECAYS else None


def _share_of_decay(check: Check) -> float:
    own = [p for p in check.parameters if p.is_optimized and math.isfinite(p.grad_norm)]
    gradient = math.hypot(*(p.grad_norm for p in own))
    decay = check.added * math.hypot(*(p.weight_norm for p in own))
    total = gradient if check.is_in_gradient else math.hypot(gradient, decay)  # at right angles, nearly
    return min(decay / total, 1.0) if total > 0 else math.nan


def _learns_by_heart(run: RunSeen) -> bool:
    """Whether other data get worse, so that larger updates would help for the batch alone."""
    return len(run.validations) > 1 and run.validations[-1] > 1.02 * run.validations[0]


def _has_found_it(run: RunSeen) -> bool:
    """Whether other data have gained, and gain no more: inputs that say little about the targets leave the loss high
    at any rate, and a larger update of such a run fits its noise.
    """
    seen = run.validated
    below = [] if seen is None else [value for value in run.validations if value < seen.constant]
    # Of a decayed rate any loss levels off; in front of a constant prediction the last bias learns alone.
    is_whole = bool(run.checks) and run.checks[-1].rate >= 0.5 * _highest(run)
    return is_whole and len(below) > 2 and below[-2] - below[-1] < _LEVELS * (below[0] - below[1])


def _way(run: RunSeen) -> float:
    """By how much of its norm all steps changed the median matrix, if they had all gone one way; infinite if unknown.

    A probe tells nothing of updates that are so small: the loss along them changes by less than rounding. A layer
    without a gradient (of dead units, say) moves at no rate.
    """
    without = {p.layer for check in run.checks for p in check.parameters if not p.has_gradient}
    initialized = _initialized(run) - without
    steps = [_of_norm(check, initialized) for check in run.checks]
    return max(steps, default=math.nan) * run.steps if steps and all(map(math.isfinite, steps)) else math.inf


def _will_learn(run: RunSeen, bound: float) -> bool:
    """Whether the run comes as far as `bound` by its end at its pace so far: then the loss does fall within the run."""
    return run.steps > 0 and outcome_of(run).progress * (run.steps_planned or 0) >= bound * run.steps


def _is_cut(run: RunSeen) -> bool:
    """Whether every gradient was as long as the clip allows, and updates are in proportion to it: those of Adam, say,
    are as large without the clip.
    """
    if run.clip is None or not run.checks:
        return False
    for check in run.checks:
        own = [p for p in check.parameters if p.is_optimized]
        gradient, update = math.hypot(*(p.grad_norm for p in own)), math.hypot(*(p.update_norm for p in own))
        if not abs(gradient - run.clip) < _ROUNDED * run.clip or not update < _MOMENTUM * check.rate * gradient:
            return False
    return True


def _overshoots(probe: ProbeSeen) -> bool:
    return probe.tenth < probe.before and not probe.full < probe.before


def _falls_short(probe: ProbeSeen) -> bool:
    # Of a tiny update, the loss after it and before it differ by rounding alone.
    return probe.thirty < probe.ten < min(probe.full, probe.before)


def _helps_others(probe: ProbeSeen) -> bool:
    return not probe.other_thirty >= probe.other_before  # NaN: no other batch yet


def _still_falls(run: RunSeen) -> bool:
    """Whether the loss has come down slowly but surely until the end: so updates help for other batches too, though
    thirty times one of them follows what is particular to its batch.

    Along updates that are far too small, the loss of a validation, whose samples stay the same, comes down steadily: if
    it goes to and fro, they are large enough for the noise of batches, and what falls is learned by heart.
    """
    quarter = run.losses.num // 4
    if not outcome_of(run).progress < _BARELY or quarter < _QUARTER or 2 * quarter > len(run.losses.recent):
        return False
    values = run.losses.last(2 * quarter)
    if not all(map(math.isfinite, values)):  # a loss scaler skips such a step
        return False
    before, after = values[:quarter], values[quarter:]
    error = math.hypot(statistics.stdev(before), statistics.stdev(after)) / math.sqrt(quarter)
    held = run.validations[len(run.validations) // 2 :]
    rises = any(map(gt, held[1:], held)) or (held and held[-1] >= held[0])
    return statistics.fmean(before) - statistics.fmean(after) > _ERRORS * error and not rises
