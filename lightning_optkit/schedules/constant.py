# SPDX-License-Identifier: Apache-2.0
"""The same factor at every step: the neutral element of products of schedules, and the flat part of a `join`."""

from lightning_optkit._checks import check_in
from lightning_optkit.schedules.schedule import Schedule

__all__ = ["constant"]


def constant(factor: float = 1.0) -> Schedule:
    """Keeps the factor at `factor`.

    Args:
        factor: The factor, in [0, inf).

    Raises:
        ValueError: if `factor` is out of range.

    Example:
        >>> constant(0.5)(1_000)
        0.5
    """
    factor = float(check_in("constant", "factor", factor, "[0, inf)"))
    return Schedule("constant", _factor, (("factor", factor),))


def _factor(step: float, total_steps: float | None, *, factor: float) -> float:
    return factor
