# SPDX-License-Identifier: Apache-2.0
r"""REX, reflected exponential decay, :math:`(1 - z) / (\frac{1}{2} + \frac{1}{2} (1 - z))` with :math:`z = t / T`.

Source: Chen et al. 2021 (REX: Revisiting Budgeted Training with an Improved Schedule), arXiv:2107.04197.
"""

from lightning_optkit._checks import check_in
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, resolve_length

__all__ = ["rex"]


def rex(min_factor: float = 0.0, steps: Length = 1.0) -> Schedule:
    """Falls from 1 to `min_factor`, above the straight line all the way and steepest at the end, then stays.

    Args:
        min_factor: Factor at the end, in [0, 1].
        steps: Length of the decay: an int >= 1 (steps) or a float in (0, 1] (fraction of the run).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> [round(rex()(t, 4), 3) for t in range(5)]
        [1.0, 0.857, 0.667, 0.4, 0.0]
    """
    min_factor = float(check_in("rex", "min_factor", min_factor, "[0, 1]"))
    steps = check_length("rex", "steps", steps)
    return Schedule("rex", _factor, (("min_factor", min_factor), ("steps", steps)))


def _factor(step: float, total_steps: float | None, *, min_factor: float, steps: Length) -> float:
    z = min(step / resolve_length("rex", "steps", steps, total_steps), 1.0)
    return min_factor + (1 - min_factor) * (1 - z) / (0.5 + 0.5 * (1 - z))
