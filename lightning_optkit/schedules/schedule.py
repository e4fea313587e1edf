# SPDX-License-Identifier: Apache-2.0
"""The `Schedule` class: a pure function from progress to the factor that multiplies a base value.

Three conventions hold for every schedule in this folder.

**Steps.** `step` counts the optimizer steps already taken, from 0, so a run of `total_steps` evaluates the factor at
0, 1, ..., total_steps - 1. Schedules are independent of optimizers: any unit works (steps, samples, tokens, fractional
epochs), as long as `step`, `total_steps` and every integer length use the same one.

**Lengths.** A length (`steps`, `warmup`, `at`, `cycle`, a milestone, ...) is an int, counted in the unit of `step`, or
a float in (0, 1], a fraction of the run: 1 is one step, 1.0 is the whole run. Fractions are resolved at each call, so
the same object serves runs of any length, and they are not rounded, except where floating point would miss a whole
number (0.07 of 100 is 7, not 7.000000000000001). Inside `warmup` and `join`, "the run" of a schedule is its own part.

**Beyond the end.** Past its last length, and past `total_steps`, a schedule keeps its last value; the periodic ones
(`triangular`, `sgdr`) continue their cycles. A length that does not fit into the run raises.
"""

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any, TypeAlias

from lightning_optkit._checks import check_in, check_instance, shown

__all__ = ["Length", "Schedule", "check_length", "check_schedule", "require_total_steps", "resolve_length"]

Length: TypeAlias = int | float  # int: steps; float: fraction of the run, in (0, 1]


class Schedule:
    """A factor as a function of progress; immutable, picklable, and printed as the call that created it.

    Created by the functions of `lightning_optkit.schedules`. `a * b` is the schedule whose factor is the product. Two
    schedules are equal if they print alike, which distinguishes 1 (one step) from 1.0 (the whole run).

    Args:
        name: Public function that created it, for error messages and printing.
        formula: Module-level function called as `formula(step, total_steps, **arguments)`.
        arguments: Keyword arguments of `formula`, as (name, value) pairs of immutable values.

    Example:
        >>> from lightning_optkit.schedules import constant, cosine
        >>> constant(factor=0.5) * cosine()
        constant(factor=0.5) * cosine(min_factor=0.0, steps=1.0)
        >>> (constant(factor=0.5) * cosine())(50, 100)
        0.25
    """

    # Not a dataclass: jsonargparse, and so LightningCLI, does not accept a function that returns one as a class_path.
    __slots__ = ("arguments", "formula", "name")

    name: str
    formula: Callable[..., float]
    arguments: tuple[tuple[str, Any], ...]

    def __init__(self, name: str, formula: Callable[..., float], arguments: tuple[tuple[str, Any], ...]) -> None:
        for attribute, value in (("name", name), ("formula", formula), ("arguments", arguments)):
            object.__setattr__(self, attribute, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Schedule, (self.name, self.formula, self.arguments)

    def __call__(self, step: float, total_steps: float | None = None) -> float:
        """Factor at `step`.

        Args:
            step: Progress: number of steps taken (or samples, tokens, epochs), in [0, inf).
            total_steps: Length of the run in the same unit, in (0, inf); None if unknown.

        Raises:
            ValueError: if either is out of range, or if the schedule needs `total_steps` or does not fit into it.
        """
        check_in(self.name, "step", step, "[0, inf)")
        if total_steps is not None:
            check_in(self.name, "total_steps", total_steps, "(0, inf)")
        return float(self.formula(step, total_steps, **dict(self.arguments)))

    def __mul__(self, other: object) -> "Schedule":
        if not isinstance(other, Schedule):
            return NotImplemented
        return Schedule("product", _product, (("factors", _factors(self) + _factors(other)),))

    def __repr__(self) -> str:
        if self.formula is _product:
            return " * ".join(map(repr, _factors(self)))
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.arguments)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return self.formula is other.formula and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


def check_schedule(owner: str, name: str, value: object) -> None:
    """Raises unless `value` is a Schedule.

    Raises:
        TypeError: if it is not.
    """
    check_instance(owner, name, value, Schedule, "a Schedule, such as cosine()")


def check_length(owner: str, name: str, value: Length, *, minimum: int = 1, whole_run: bool = True) -> Length:
    """Returns `value` if it is a length: an int >= `minimum`, or a float in (0, 1], below 1 unless `whole_run`.

    Raises:
        TypeError: if it is not an int or a float.
        ValueError: if it is out of range, or NaN.

    Example:
        >>> check_length("cosine", "steps", 0.5)
        0.5
    """
    interval = "(0, 1]" if whole_run else "(0, 1)"
    requirement = f"{name} must be an int >= {minimum} (steps) or a float in {interval} (fraction of the run)"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}({name}={shown(value)}): {requirement}.")
    in_range = minimum <= value < 2**63 if isinstance(value, int) else 0 < value <= 1 and (whole_run or value < 1)
    if not in_range:
        raise ValueError(f"{owner}({name}={shown(value)}): {requirement}.")
    return value if isinstance(value, int) else float(value)


def require_total_steps(owner: str, total_steps: float | None, because: str) -> float:
    """Returns `total_steps` if it is not None.

    Raises:
        ValueError: if it is None, with the reason why it is needed.
    """
    if total_steps is None:
        raise ValueError(f"{owner}(total_steps=None): total_steps must be given, because {because}.")
    return total_steps


def resolve_length(
    owner: str,
    name: str,
    length: Length,
    total_steps: float | None,
    *,
    may_exceed_run: bool = False,
    must_leave_rest: bool = False,
) -> float:
    """Converts a checked length into the unit of `step`. The only place where fractions become steps.

    Args:
        owner: Function named in error messages.
        name: Argument named in error messages.
        length: Int (steps), or float in (0, 1] (fraction of the run).
        total_steps: Length of the run, or None if unknown.
        may_exceed_run: True for a unit of time, which need not fit into the run.
        must_leave_rest: True for a part that is followed by another, so it must be shorter than the run.

    Raises:
        ValueError: for a fraction of an unknown `total_steps`, or a length that does not fit into it.

    Example:
        >>> resolve_length("cosine", "steps", 0.07, total_steps=100)
        7.0
    """
    steps = float(length)
    if isinstance(length, float):
        steps *= require_total_steps(owner, total_steps, f"{name}={length!r} is a fraction of the run")
        whole = float(round(steps))
        steps = whole if math.isclose(steps, whole, rel_tol=1e-12) else steps
        if steps == 0:
            raise ValueError(f"{owner}(total_steps={total_steps!r}): total_steps must be large enough for {name}.")
    if total_steps is None or may_exceed_run:
        return steps
    if steps > total_steps:
        raise ValueError(f"{owner}({name}={length!r}): {name} must not exceed total_steps={total_steps!r}.")
    if must_leave_rest and steps == total_steps:
        raise ValueError(f"{owner}({name}={length!r}): {name} must be less than total_steps={total_steps!r}.")
    return steps


def _factors(schedule: Schedule) -> tuple[Schedule, ...]:
    if schedule.formula is not _product:
        return (schedule,)
    factors: tuple[Schedule, ...] = dict(schedule.arguments)["factors"]
    return factors


def _product(step: float, total_steps: float | None, *, factors: tuple[Schedule, ...]) -> float:
    return math.prod(factor(step, total_steps) for factor in factors)
