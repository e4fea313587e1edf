# SPDX-License-Identifier: Apache-2.0
"""Piecewise constant decay, also called step decay: one factor per piece of the run.

Source: Qiu Xipeng, Neural Networks and Deep Learning, section 7.2.3 (piecewise constant decay).
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from lightning_optkit._checks import check_in, check_listed, shown
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, resolve_length

__all__ = ["piecewise_constant"]


def piecewise_constant(milestones: Sequence[Length], factors: Sequence[float]) -> Schedule:
    """Takes `factors[i]` between the i-th milestone and the next; a new piece starts at its milestone.

    With factors 1, gamma, gamma^2, ... this is torch's MultiStepLR (or StepLR, for equidistant milestones).

    Args:
        milestones: Boundaries of the pieces, strictly increasing: each an int >= 1 (steps) or a float in (0, 1]
            (fraction of the run).
        factors: One more than there are milestones, each in [0, inf).

    Raises:
        ValueError: if the milestones do not increase, do not fit into the run, or the counts do not match.

    Example:
        >>> schedule = piecewise_constant(milestones=[2, 4], factors=[1.0, 0.1, 0.01])
        >>> [schedule(t) for t in range(6)]
        [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    """
    given = check_listed(
        "piecewise_constant", "milestones", milestones, "a list of lengths, such as [0.5, 0.75]", empty=True
    )
    milestones = tuple(check_length("piecewise_constant", "milestones", milestone) for milestone in given)
    values = check_listed("piecewise_constant", "factors", factors, "a list of numbers, such as [1.0, 0.1, 0.01]")
    factors = tuple(float(check_in("piecewise_constant", "factors", factor, "[0, inf)")) for factor in values)
    if len(factors) != len(milestones) + 1:
        raise ValueError(
            f"piecewise_constant(factors={shown(factors)}): factors must have one value more than the "
            f"{len(milestones)} milestones."
        )
    for kind in (int, float):
        _check_increasing(milestones, tuple(float(m) for m in milestones if isinstance(m, kind)))
    return Schedule("piecewise_constant", _factor, (("milestones", milestones), ("factors", factors)))


def _factor(
    step: float, total_steps: float | None, *, milestones: tuple[Length, ...], factors: tuple[float, ...]
) -> float:
    resolved = tuple(resolve_length("piecewise_constant", "milestones", m, total_steps) for m in milestones)
    _check_increasing(milestones, resolved)
    return factors[bisect_right(resolved, step)]


def _check_increasing(milestones: tuple[Length, ...], steps: tuple[float, ...]) -> None:
    if any(left >= right for left, right in pairwise(steps)):
        raise ValueError(
            f"piecewise_constant(milestones={shown(milestones)}): milestones must increase strictly, "
            "so that the pieces do not overlap."
        )
