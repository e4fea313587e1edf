# SPDX-License-Identifier: Apache-2.0
"""One class that is so frequent that the others are hardly learned."""

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics._signals import LossSeen
from lightning_optkit.diagnostics.rules.outcome import outcome_of
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["class_imbalance", "is_dominated", "missing_class"]

_SHARE = 0.8  # judgement: four samples of one class to one of all others together
_SINCE = 0.5  # share of the run; before it, the frequencies are learned, whatever comes after
_CHANCE = 1e-3  # theory: with which a class of that share is in none of so many samples
_ALL = 1000  # theory: of others below three in a thousand, none is seen among so many in 1 of 20 cases
_OTHERS = 10  # samples of other classes that were seen since
_MISSED, _FOUND = 0.5, 0.9  # judgement: of the others half are missed, of the most frequent class nearly all are found


def is_dominated(run: RunSeen) -> bool:
    """Whether one class has over four fifths of the samples of all measured steps."""
    return _share(_losses(run, 0)) > _SHARE


def class_imbalance(run: RunSeen) -> Verdict | None:
    """Late in the run half of the samples of other classes are missed, while the most frequent one is found."""
    outcome = outcome_of(run)
    if outcome.has_diverged or not outcome.is_late or not is_dominated(run):
        return None
    every = _losses(run, 0)
    if sum(each.num_common for each in every) >= _ALL and not any(each.num_others for each in every):
        return _single(every)
    seen = _losses(run, int(_SINCE * run.steps))
    others, missed = sum(each.num_others for each in seen), sum(each.missed_others for each in seen)
    num, errors = sum(each.num_common for each in seen), sum(each.missed_common for each in seen)
    if others < _OTHERS or missed < _MISSED * others or errors > (1 - _FOUND) * num:
        return None
    cause = (
        f"{num / (num + others):.0%} of the samples are of class {seen[0].common}, and the others are hardly learned"
    )
    evidence = (
        f"in the last {len(seen)} measured steps {missed} of {others} samples of other classes were predicted wrongly, "
        f"and {errors} of {num} of that class"
    )
    remedy = (
        "torch.utils.data.WeightedRandomSampler((1 / torch.bincount(y.long()))[y.long()], len(y)) as sampler of the "
        "DataLoader, where y are the training labels; or weight= (pos_weight=) in the loss function"
    )
    return Verdict("class_imbalance", None, cause, evidence, remedy, 0, 0.85)


def missing_class(run: RunSeen) -> tuple[int, float, int] | None:
    """The most frequent class of the first validation that training does not have; its share there, and how many
    training samples were looked at. None if there is none, or too few were to tell.
    """
    every = [loss for loss in _losses(run, 0) if loss.present]
    counts = () if run.validated is None else run.validated.counts
    present = {each for loss in every for each in loss.present}
    samples, total = sum(each.num_common + each.num_others for each in every), max(sum(counts), 1)
    shares = [(count / total, place) for place, count in enumerate(counts) if place not in present]
    share, place = max(shares, default=(0.0, 0))
    return (place, share, samples) if present and (1 - share) ** samples < _CHANCE else None


def _single(seen: list[LossSeen]) -> Verdict:
    cause = f"all targets are of class {seen[0].common}, so there is nothing to tell apart"
    evidence = f"none of {sum(each.num_common for each in seen):,} targets in {len(seen)} measured steps was of another"
    remedy = "look at torch.bincount(y) of the training labels: they may have been divided, rounded or filtered"
    return Verdict("class_imbalance", None, cause, evidence, remedy, 0, 0.95)


def _losses(run: RunSeen, since: int) -> list[LossSeen]:
    """Those of classes, in the measured steps from this one on that called one loss function."""
    return [c.losses[0] for c in run.checks if c.step >= since and len(c.losses) == 1 and c.losses[0].common >= 0]


def _share(seen: list[LossSeen]) -> float:
    """Of the samples of the most frequent class, if that is the same in every step."""
    samples = sum(each.num_common + each.num_others for each in seen)
    is_same = len({each.common for each in seen}) == 1
    return sum(each.num_common for each in seen) / samples if is_same else 0.0
