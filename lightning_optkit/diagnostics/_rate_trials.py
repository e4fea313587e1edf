# SPDX-License-Identifier: Apache-2.0
"""Chooses among learning rates by training at each: at many for a few steps, at the best ones for more.

A range test sees one step per rate, so it cannot tell which of the rates around its suggestions trains best. Training
can, and successive halving bounds what it costs: each of three rounds trains twice as long as the one before, from the
same start and on the same batches, at fewer rates.

Source: Jamieson, Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
arXiv:1502.07943, algorithm 1. Unlike there, a round begins anew, so that nothing but the start must be kept, and the
second round looks beside the best rate of the first, whose rates lie far apart.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

__all__ = ["TRAINED", "RateTrial", "best_of", "ladder", "loss_of", "trials_of"]

TRAINED = "trained"  # its name among the suggestions
_MOST = 10  # rates of the first round
_FACTOR = 3.0  # from one of them to the next
_BEYOND = 10.0  # times the largest suggestion, and below the smallest
_LAST = 4  # the mean loss of the last quarter counts
_CAREFUL = "valley"  # far below what trains best, so it would only make the ladder longer


class RateTrial(NamedTuple):
    """A short training at a rate.

    Attributes:
        lr: The rate.
        steps: Steps that it was trained for; fewer than planned if the loss diverged.
        loss: Mean loss of the last quarter of the steps; infinite if it diverged.
    """

    lr: float
    steps: int
    loss: float


def ladder(suggestions: dict[str, float | None]) -> list[float]:
    """At most 10 rates, a factor of about 3 apart, around the suggestions of a range test; empty without one."""
    found = [rate for name, rate in suggestions.items() if rate is not None and name != _CAREFUL]
    if not found:
        return []
    low, high = math.log(min(found) / _BEYOND), math.log(max(found) * _BEYOND)
    gaps = min(math.ceil((high - low) / math.log(_FACTOR)), _MOST - 1)
    return [math.exp(low + (high - low) * place / gaps) for place in range(gaps + 1)]


def trials_of(rates: Sequence[float], steps: int, train: Callable[[float, int], RateTrial]) -> list[RateTrial]:
    """The trials of all rounds, in order.

    A quarter of `steps` at each of `rates`; half of them at the best two, at its neighbors halfway to the next rates,
    and beyond the end of the ladder if it is there; all of them at the best two of these.

    Args:
        rates: The rates, increasing by a constant factor.
        steps: Steps of the last round.
        train: Trains at a rate for so many steps, always from the same start and on the same batches.
    """
    first = [train(rate, steps // 4) for rate in rates]
    best = _best(first)
    if not best:
        return first
    halfway = math.sqrt(rates[-1] / rates[0]) ** (1 / max(len(rates) - 1, 1))
    beside = [best[0] / halfway, best[0] * halfway]
    if best[0] in (rates[0], rates[-1]):
        beside.append(best[0] / halfway**2 if best[0] == rates[0] else best[0] * halfway**2)
    second = [train(rate, steps // 2) for rate in sorted([*best, *beside])]
    return [*first, *second, *(train(rate, steps) for rate in _best(second))]


def _best(trials: Sequence[RateTrial]) -> list[float]:
    """The rates with the two lowest losses that are finite."""
    sound = sorted((trial for trial in trials if math.isfinite(trial.loss)), key=lambda trial: trial.loss)
    return [trial.lr for trial in sound[:2]]


def best_of(trials: Sequence[RateTrial]) -> float | None:
    """The rate with the lowest loss of the longest trials that did not diverge; None if all did."""
    sound = [trial for trial in trials if math.isfinite(trial.loss)]
    return min(sound, key=lambda trial: (-trial.steps, trial.loss)).lr if sound else None


def loss_of(losses: Sequence[float], steps: int) -> float:
    """The loss that a trial of `steps` steps is judged by: infinite if it ended early."""
    if len(losses) < steps or not all(map(math.isfinite, losses)):
        return math.inf
    return fmean(losses[-max(steps // _LAST, 1) :])
