# SPDX-License-Identifier: Apache-2.0
"""The learning-rate range test: the loss while the rate grows, and the rates that it suggests."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_optkit._checks import check_in, check_like, check_listed, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RULES", "LRRange", "lr_range", "stands_alone"]

RULES = ("middle", "steepest", "valley", "minimum")

# Those that mean the rate of a training; "valley" is careful by design, some 100 times below them.
_OF_TRAINING = ("middle", "steepest", "minimum")
_FAR = 10.0  # calibrated: of 27 tests on small tasks 2 had a "middle" of no use, 25 times and more from both others

_LEAST_FALL = 3.0  # in standard deviations of a smoothed loss, since the lowest is one of many
_WIDTH = 0.03  # standard deviation of the smoothing, as a share of the sweep


@dataclass(frozen=True)
class LRRange:
    """The result of a range test: of `lr_range`, and of `LRFinder`.

    Attributes:
        lrs: The rates, increasing.
        losses: The loss at each, before the step with that rate.
        smoothed: The losses, smoothed without delay; the last ones are missing if the test diverged.
        suggestions: The rate of each rule: "middle", "steepest", "valley" and "minimum"; None without a suggestion.
        reason: Why there is no suggestion; empty if there is one.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestions: dict[str, float | None]
    reason: str = ""

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Plots loss and suggestions over the rate, and returns the axes. Saves nothing and opens no window.

        Args:
            ax: Axes to draw on. Default: those of a new figure.
        """
        if ax is None:
            from matplotlib.figure import Figure  # not pyplot: no global state, and no GUI backend

            ax = Figure(layout="constrained").subplots()
        check_like("LRRange.plot", "ax", ax, ("plot", "set_xlabel", "legend"), "the axes of a figure")
        ax.plot(self.lrs, self.losses, color="0.75", linewidth=1, label="loss")
        ax.plot(self.lrs[: len(self.smoothed)], self.smoothed, color="C0", label="smoothed")
        for place, (name, lr) in enumerate(self.suggestions.items(), start=1):
            if lr is not None:
                ax.axvline(lr, color=f"C{place}", linestyle="--", label=f"{name}: {lr:.2g}")
        ax.set_xscale("log")
        finite = [value for value in self.smoothed if math.isfinite(value)]
        if finite:
            low, high = min(finite), max(finite[0], sorted(finite)[len(finite) // 2])
            margin = 0.3 * (high - low) or abs(high) or 1.0
            ax.set_ylim(low - margin, high + margin)  # a diverging end would flatten all that matters
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
        ax.legend()
        return ax


def _number(loss: Any) -> float:
    try:
        return float(loss)  # also NaN, and a tensor of one element
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lr_range(losses={shown(loss)}): each of losses must be a number.") from error


def lr_range(lrs: Sequence[float], losses: Sequence[float]) -> LRRange:
    """Smooths the losses of a range test, and finds the rates that they suggest.

    - "middle": half of the geometric mean of two rates: the smallest with half of the fall of the loss, and the largest
      that keeps nine tenths of it. It had the lowest losses after training on nine small tasks
      (`benchmarks/lr_finder_convergence.py`).
    - "steepest": where the loss falls fastest per factor of the rate (Smith 2017, section 3.3, read off the plot).
    - "valley": halfway, in factors, into the longest stretch over which the loss falls (the rule of fastai's
      `valley`): a careful rate.
    - "minimum": a tenth of the rate with the lowest loss, since the lowest loss is already at the edge.

    Args:
        lrs: Rates, positive and increasing, evenly spaced on a logarithmic scale.
        losses: The loss at each; what follows a loss that is not finite is left out.

    Raises:
        TypeError: if a loss is no number.
        ValueError: if the lengths differ, or a rate is not positive or not above the one before.

    Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186.

    Example:
        >>> lrs = [10 ** (-5 + place / 20) for place in range(101)]
        >>> losses = [1 / (1 + 500 * lr) + 20 * max(lr - 0.05, 0) ** 2 for lr in lrs]
        >>> {name: f"{lr:.0e}" for name, lr in lr_range(lrs, losses).suggestions.items()}
        {'middle': '7e-03', 'steepest': '2e-03', 'valley': '7e-04', 'minimum': '5e-03'}
    """
    rates = [check_in("lr_range", "lrs", lr, "(0, inf)") for lr in check_listed("lr_range", "lrs", lrs, _RATES)]
    values = [_number(loss) for loss in check_listed("lr_range", "losses", losses, _LOSSES)]
    if len(rates) != len(values):
        raise ValueError(f"lr_range(losses=...): losses must have one entry per rate; {len(values)} for {len(rates)}.")
    if any(after <= before for before, after in itertools.pairwise(rates)):
        raise ValueError("lr_range(lrs=...): lrs must increase.")
    finite = next((place for place, value in enumerate(values) if not math.isfinite(value)), len(values))
    smooth = _smoothed(values[:finite])
    none: dict[str, float | None] = dict.fromkeys(RULES)
    if len(smooth) < 10:
        reason = f"only {len(smooth)} finite losses; at least 10 are needed"
        return LRRange(tuple(rates), tuple(values), tuple(smooth), none, reason)
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    noise = _noise(values[:finite], smooth)
    fall = _start(smooth) - smooth[lowest] if lowest >= len(smooth) // 5 else 0.0
    if fall <= _LEAST_FALL * noise:
        reason = "the loss does not fall by more than its noise; try larger rates, or more steps"
        return LRRange(tuple(rates), tuple(values), tuple(smooth), none, reason)
    suggestions: dict[str, float | None] = {
        "middle": _middle(rates, smooth, lowest, fall),
        "steepest": rates[_steepest(smooth, lowest)],
        "valley": rates[_valley(smooth)],
        "minimum": rates[lowest] / 10,
    }
    return LRRange(tuple(rates), tuple(values), tuple(smooth), suggestions)


def stands_alone(suggestions: Mapping[str, float | None], chosen: str) -> bool:
    """Whether the rate of a rule is far, more than 10 times, from that of each other one.

    Example:
        >>> rates = {"middle": 4e-5, "steepest": 1e-3, "valley": 1e-3, "minimum": 3e-3}
        >>> stands_alone(rates, "middle"), stands_alone(rates, "steepest")
        (True, False)
    """
    rate = suggestions.get(chosen)
    others = [suggestions.get(rule) for rule in _OF_TRAINING if rule != chosen]
    if rate is None or chosen not in _OF_TRAINING:
        return False
    return all(other is not None and max(rate / other, other / rate) > _FAR for other in others)


_RATES = "a list of rates, such as [1e-5, 1e-4]"
_LOSSES = "a list of losses, such as [2.3, 2.1]"


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Weighted means around each place. An exponential average would be late, and suggest too large a rate."""
    width = max(_WIDTH * len(losses), 0.5)
    reach = math.ceil(3 * width)
    weights = [math.exp(-0.5 * (offset / width) ** 2) for offset in range(-reach, reach + 1)]
    means = []
    for place in range(len(losses)):
        # As far to the left as to the right, so that a slope does not bend at the ends.
        span = min(reach, place, len(losses) - 1 - place)
        pairs = [(weights[reach + offset], losses[place + offset]) for offset in range(-span, span + 1)]
        means.append(sum(weight * loss for weight, loss in pairs) / sum(weight for weight, _ in pairs))
    return means


def _noise(losses: Sequence[float], smooth: Sequence[float]) -> float:
    """A robust standard deviation of the losses around their smoothed curve, of one smoothed value."""
    off = sorted(abs(loss - mean) for loss, mean in zip(losses, smooth, strict=True))
    averaged = max(_WIDTH * len(losses) * 2 * math.sqrt(math.pi), 1.0)
    return 1.4826 * off[len(off) // 2] / math.sqrt(averaged)


def _start(smooth: Sequence[float]) -> float:
    """The median of the first fifth: its first values are hardly smoothed."""
    first = sorted(smooth[: max(len(smooth) // 5, 5)])
    return first[len(first) // 2]


def _middle(rates: Sequence[float], smooth: Sequence[float], lowest: int, fall: float) -> float:
    half = next(place for place in range(len(smooth)) if smooth[place] <= smooth[lowest] + 0.5 * fall)
    edge = max(place for place in range(lowest, len(smooth)) if smooth[place] <= smooth[lowest] + 0.1 * fall)
    return 0.5 * math.sqrt(rates[half] * rates[edge])


def _steepest(smooth: Sequence[float], lowest: int) -> int:
    first = math.ceil(3 * _WIDTH * len(smooth))  # before it, fewer losses are averaged
    slopes = {place: smooth[place + 1] - smooth[place - 1] for place in range(first, max(lowest, first + 1))}
    return min(slopes, key=slopes.__getitem__)


def _valley(smooth: Sequence[float]) -> int:
    """Halfway into the longest run of losses that fall from one to the next, places in between left out."""
    lengths, starts = [1] * len(smooth), list(range(len(smooth)))
    for place in range(1, len(smooth)):
        for before in range(place):
            if smooth[before] > smooth[place] and lengths[before] + 1 > lengths[place]:
                lengths[place], starts[place] = lengths[before] + 1, starts[before]
    end = max(range(len(smooth)), key=lengths.__getitem__)
    return starts[end] + (end - starts[end]) // 2
