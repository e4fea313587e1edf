# SPDX-License-Identifier: Apache-2.0
"""Values over optimizer steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_optkit._checks import check_in, check_int, check_listed

__all__ = ["Curve", "tamed"]

_LARGEST = 1e250
_MAX_POINTS = 4_096  # per curve: more are not visible in a plot, and would enlarge checkpoints


def tamed(values: Sequence[float]) -> list[float]:
    """Finite values within what means, and the ticks of an axis, can hold.

    Example:
        >>> tamed([1.0, -1e308])
        [1.0, -1e+250]
    """
    return [min(max(value, -_LARGEST), _LARGEST) for value in values]


@dataclass
class Curve:
    """Values over optimizer steps, thinned evenly to at most 4,096 for a run of any length.

    Args:
        steps: Optimizer steps taken, from 1.
        values: One per kept step.
        every: Number of appended values per kept value.
        num_appended: Number of values appended so far, kept or not.

    Raises:
        TypeError: if `steps` or `values` is not a list of numbers.
        ValueError: if the two differ in length, or a count is out of range.

    Example:
        >>> loss = Curve()
        >>> loss.append(1, 2.5)
        >>> loss.append(2, float("nan"))
        >>> loss.finite()
        ([1], [2.5])
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    every: int = 1
    num_appended: int = 0

    def __post_init__(self) -> None:
        for name, numbers in (("steps", self.steps), ("values", self.values)):
            listed = check_listed(type(self).__name__, name, numbers, "a list of numbers, such as [1, 2]", empty=True)
            for number in listed:
                if not (isinstance(number, float) and math.isnan(number)):
                    check_in(type(self).__name__, name, number, "[-inf, inf]")
            setattr(self, name, listed)
        if len(self.steps) != len(self.values):
            raise ValueError(
                f"{type(self).__name__}(values=<{len(self.values)}>): values must be as many as steps, "
                f"{len(self.steps)}."
            )
        check_int(type(self).__name__, "every", self.every, minimum=1)
        check_int(type(self).__name__, "num_appended", self.num_appended, minimum=0)

    def append(self, step: int, value: float) -> None:
        """Keeps `value`, or only every `every`-th one if there are too many."""
        if self.num_appended % self.every == 0:
            self.steps.append(step)
            self.values.append(value)
        self.num_appended += 1
        if len(self.steps) >= _MAX_POINTS:
            del self.steps[1::2], self.values[1::2]
            self.every *= 2

    def finite(self) -> tuple[list[int], list[float]]:
        """Steps and values without those that are inf or NaN."""
        kept = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]
        return [step for step, _ in kept], [value for _, value in kept]

    @property
    def last(self) -> float | None:
        """The last finite value, or None."""
        values = self.finite()[1]
        return values[-1] if values else None
