# SPDX-License-Identifier: Apache-2.0
"""Tells a bad batch, or broken weights, from the losses and gradient norms of a run."""

import math
from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import Any, Literal

from lightning_optkit._checks import check_in, check_int, check_numbers, check_state

__all__ = ["SpikeDetector", "SpikeEvent"]

_RECENT = 33  # steps whose median is what a step is compared with
_FIRST = 10  # steps whose median is the loss at the start
_DEVIATIONS = 12.0  # robust standard deviations: 868 of 99,084 healthy steps exceed 10 of them
_LOST_PROGRESS = 0.3  # share of the fall of the loss since the start
_LEAST_OF_NORM = 0.5  # the factor of a norm that is small, as that of a saturated network
_OF_NORM_ALONE = 20.0  # times the largest norm; of 34,464 healthy norms the largest was 9 times
_RANKED = 128  # normal losses among which a loss has its rank
_OF_SPIKE = 1.2  # what a spike adds to the sum
_OF_DEVIATION, _ALLOWED = 0.3, 0.15  # what a loss adds per standard deviation, and what is normal: half of one
_LEAST_LOST = 0.05  # share of the fall that a step of the sum must give back
_LEAST = 1e-12
_NORMAL = NormalDist()
_LARGEST_EXPONENT = 700.0  # of a number that a float can hold


@dataclass(frozen=True)
class SpikeEvent:
    """What `SpikeGuard` did about a step, in its list `events`.

    Attributes:
        step: Optimizer steps before it.
        action: "skip", "shrink", "rollback", "accept" (the losses stay high, and there is no copy) or "stop".
        loss: Its loss.
        norm: Its gradient norm.
        back_to: For a rollback, the step of the state that was restored.
    """

    step: int
    action: Literal["skip", "shrink", "rollback", "accept", "stop"]
    loss: float
    norm: float
    back_to: int | None = None


class SpikeDetector:
    """Compares loss and gradient norm of a step with what was usual and with the worst that was normal.

    A fixed number of standard deviations does not fit: losses of small batches have heavy tails. The largest excess
    over the recent median among the last `window` steps is their measure. A step is a "spike" if

        loss excess / largest loss excess * sqrt(norm / largest norm * norm / largest norm of the run) > threshold,

    the first two norms relative to their medians, and each ratio of norms at least 1/2 (a saturated network has a small
    gradient), if besides the loss is more than 12 robust standard deviations off and gives back more than 30 % of its
    fall since the start; or if the norm is 20 times the largest, and above all norms of the run; or if one of the two
    is not finite. A hard but healthy batch has a high loss and a norm as other hard batches have; a bad one exceeds
    both. The largest norm of the run counts since hard samples return once in an epoch, which may be longer than
    `window`, and since a norm that the run has survived does little harm.

    The weights are "broken" if a sum over the steps, which does not fall below 0, exceeds `patience`. A spike adds 1.2;
    a loss adds 0.3 per standard deviation above the median, less 0.15: after three spikes, or some twenty losses that
    are a little too high. The deviations are those of a normal variable of the same rank among the last 128 normal
    losses, so heavy tails do not count.
    Measured: `python benchmarks/spike_detection.py`.

    Args:
        window: Steps that are remembered, at least 64.
        threshold: Of a spike, in (0, inf); larger ones find less and are wrong less often.
        patience: Of the sum, in (0, inf).
        warmup: Steps before the first spike, at least 10; other losses count after twice as many.

    Raises:
        ValueError: for an argument out of range.

    Source: the sum is that of Page 1954, "Continuous Inspection Schemes", Biometrika 41, section 2; ranks in place of
    values as in van der Waerden's scores.

    Example:
        >>> detector = SpikeDetector()
        >>> for step in range(100):
        ...     detector.accept(loss=2.0 / (1 + step) + 0.01 * (step % 3), norm=1.0 + 0.1 * (step % 5))
        >>> detector.judge(loss=0.05, norm=1.2), detector.judge(loss=3.0, norm=9.0), detector.judge(math.nan, 1.0)
        ('fine', 'spike', 'spike')
    """

    def __init__(self, window: int = 256, threshold: float = 3.3, patience: float = 3.0, warmup: int = 64) -> None:
        owner = type(self).__name__
        self.window = check_int(owner, "window", window, minimum=64)
        self.threshold = check_in(owner, "threshold", threshold, "(0, inf)")
        self.patience = check_in(owner, "patience", patience, "(0, inf)")
        self.warmup = check_int(owner, "warmup", warmup, minimum=_FIRST)
        self._first: list[float] = []
        self._count = 0
        self._sum = 0.0
        self._waiting: list[tuple[float, float]] = []  # steps taken while the sum is above 0
        self._losses, self._norms = _Series(self.window), _Series(self.window)
        self._past: deque[float] = deque(maxlen=_RANKED)  # normal losses
        self._highest = -math.inf  # logarithm of the largest norm of the run

    def judge(self, loss: float, norm: float) -> Literal["fine", "spike", "broken"]:
        """What a step is that has not been taken; nothing is remembered.

        Args:
            loss: Its loss.
            norm: Its gradient norm, before clipping.
        """
        is_spike = self._is_spike(loss, norm)
        if self._sum_after(loss, is_spike) > self.patience:
            return "broken"
        return "spike" if is_spike else "fine"

    def accept(self, loss: float, norm: float) -> None:
        """Remembers a step that is taken. While the sum is above 0, it is not known to be normal, and waits."""
        self._sum = self._sum_after(loss, self._is_spike(loss, norm))
        if math.isfinite(loss) and math.isfinite(norm):
            self._waiting.append((loss, norm))
        if self._sum == 0:
            for one in self._waiting:
                self._remember(*one)
            self._waiting = []

    def reject(self, loss: float, norm: float) -> None:
        """Counts a step that is not taken."""
        self._sum = self._sum_after(loss, self._is_spike(loss, norm))

    def restart(self) -> None:
        """Forgets the steps since the last calm one: their weights are gone."""
        self._sum, self._waiting = 0.0, []

    @property
    def is_calm(self) -> bool:
        """Whether the losses so far are normal."""
        return self._sum == 0

    @property
    def usual(self) -> tuple[float, float] | None:
        """The median loss and norm of the last 33 normal steps; None before the first."""
        return (self._losses.usual, math.exp(self._norms.usual)) if self._count else None

    @property
    def _progress(self) -> float:
        return max(median(self._first) - self._losses.usual, _LEAST)

    def _is_spike(self, loss: float, norm: float) -> bool:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return True
        if self._count < self.warmup:
            return False
        of_window = _exp(self._norms.beyond(_log(norm)))
        of_run = _exp(_log(norm) - self._highest)
        if of_window > _OF_NORM_ALONE and of_run > 1:
            return True
        excess, ratio = loss - self._losses.usual, self._losses.ratio(loss)
        if excess <= _LOST_PROGRESS * self._progress or excess <= _DEVIATIONS * self._losses.deviation:
            return False
        of_norm = math.sqrt(max(of_window, _LEAST_OF_NORM)) * math.sqrt(max(of_run, _LEAST_OF_NORM))
        return bool(ratio * of_norm > self.threshold)

    def _sum_after(self, loss: float, is_spike: bool) -> float:
        if is_spike:
            return self._sum + _OF_SPIKE
        if self._count < 2 * self.warmup:  # while a loss falls fast, ranks say little
            return max(self._sum - _ALLOWED, 0.0)
        return max(self._sum + _OF_DEVIATION * self._deviations(loss) - _ALLOWED, 0.0)

    def _deviations(self, loss: float) -> float:
        """The normal score of a loss; not above 0 if it gives back hardly anything."""
        ordered = sorted(self._past)
        rank = (bisect_left(ordered, loss) + bisect_right(ordered, loss)) / 2
        score = _NORMAL.inv_cdf((rank + 0.5) / (len(ordered) + 1))
        is_little = loss - self._losses.usual <= _LEAST_LOST * self._progress
        return min(score, 0.0) if is_little else score

    def _remember(self, loss: float, norm: float) -> None:
        if len(self._first) < _FIRST:
            self._first.append(loss)
        self._count += 1
        self._losses.append(loss)
        self._past.append(loss)
        self._norms.append(_log(norm))
        self._highest = max(self._highest, _log(norm))

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, in plain types."""
        series = {"losses": self._losses.to_lists(), "norms": self._norms.to_lists()}
        waiting = [list(one) for one in self._waiting]
        counts = {"count": self._count, "sum": self._sum, "highest": self._highest}
        return {**counts, "first": list(self._first), "past": list(self._past), "waiting": waiting, **series}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        owner, numbers = type(self).__name__, "(-inf, inf)"
        kinds: dict[str, Any] = dict(
            count=int,
            sum=(int, float),
            highest=(int, float),
            first=list,
            past=list,
            waiting=list,
            losses=list,
            norms=list,
        )
        state, where = check_state(owner, state_dict, **kinds), f"{owner}.load_state_dict"
        first = [check_in(where, "state_dict['first']", loss, numbers) for loss in state["first"]]
        past = [check_in(where, "state_dict['past']", loss, numbers) for loss in state["past"]]
        waiting = [check_numbers(where, "state_dict['waiting']", one, 2, numbers) for one in state["waiting"]]
        losses, norms = (_Series.of(owner, self.window, state[name]) for name in ("losses", "norms"))
        self._count, self._sum, self._first, self._losses, self._norms = (
            state["count"],
            state["sum"],
            first,
            losses,
            norms,
        )
        self._highest, self._past = float(state["highest"]), deque(past, maxlen=_RANKED)
        self._waiting = [(loss, norm) for loss, norm in waiting]


class _Series:
    """The last values, and the last excesses over the median of those before."""

    def __init__(self, window: int) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._excesses: deque[float] = deque(maxlen=window)

    @classmethod
    def of(cls, owner: str, window: int, lists: list[Any]) -> "_Series":
        series, where = cls(window), f"{owner}.load_state_dict"
        if len(lists) != 2:
            raise ValueError(f"{where}(state_dict={lists!r}): a series must be two lists, of values and of excesses.")
        for values, target in zip(lists, (series._recent, series._excesses), strict=True):
            target.extend(check_in(where, "state_dict", value, "(-inf, inf)") for value in values)
        return series

    def append(self, value: float) -> None:
        if self._recent:
            self._excesses.append(value - self.usual)
        self._recent.append(value)

    @property
    def usual(self) -> float:
        return median(self._recent)

    @property
    def deviation(self) -> float:
        """A robust standard deviation of the excesses."""
        return max(1.4826 * median(map(abs, self._excesses)), _LEAST)

    def ratio(self, value: float) -> float:
        """The excess over the usual, in multiples of the largest of the window."""
        return (value - self.usual) / max(max(self._excesses), _LEAST)

    def beyond(self, value: float) -> float:
        """How far the excess over the usual is above the largest of the window."""
        return value - self.usual - max(max(self._excesses), 0.0)

    def to_lists(self) -> list[list[float]]:
        return [list(self._recent), list(self._excesses)]


def _log(norm: float) -> float:
    return math.log(max(norm, _LEAST))


def _exp(exponent: float) -> float:
    return math.exp(min(exponent, _LARGEST_EXPONENT))
