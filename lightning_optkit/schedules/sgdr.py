# SPDX-License-Identifier: Apache-2.0
"""Cosine decay with warm restarts (SGDR).

Source: Loshchilov and Hutter 2017 (SGDR), arXiv:1608.03983, equation 5.
"""

import math

from lightning_optkit._checks import check_in
from lightning_optkit.schedules._anneal import anneal
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, resolve_length

__all__ = ["sgdr"]


def sgdr(cycle: Length = 0.25, cycle_mult: float = 1.0, min_factor: float = 0.0) -> Schedule:
    """Warm restarts: falls from 1 to `min_factor` along half a cosine, jumps back to 1, and starts again.

    Same as torch's CosineAnnealingWarmRestarts, whose T_0 is `cycle` and whose T_mult is `cycle_mult`. The model is
    best at the end of a cycle: a run of whole cycles ends on one (1, 2 and 4 parts of 7 with `cycle=1/7,
    cycle_mult=2`).

    Args:
        cycle: Length of the first cycle: an int >= 1 (steps) or a float in (0, 1] (fraction of the run).
        cycle_mult: Ratio of the length of each cycle to the previous one, in [1, inf).
        min_factor: Lowest factor of a cycle, in [0, 1].

    Raises:
        ValueError: if an argument is out of range, or the first cycle is longer than the run.

    Example:
        >>> [round(sgdr(cycle=2, cycle_mult=2.0)(t), 3) for t in range(7)]
        [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]
    """
    cycle = check_length("sgdr", "cycle", cycle)
    cycle_mult = float(check_in("sgdr", "cycle_mult", cycle_mult, "[1, inf)"))
    min_factor = float(check_in("sgdr", "min_factor", min_factor, "[0, 1]"))
    return Schedule("sgdr", _factor, (("cycle", cycle), ("cycle_mult", cycle_mult), ("min_factor", min_factor)))


def _factor(step: float, total_steps: float | None, *, cycle: Length, cycle_mult: float, min_factor: float) -> float:
    length = resolve_length("sgdr", "cycle", cycle, total_steps)
    start = 0.0 if cycle_mult > 1 else step - math.fmod(step, length)
    while step >= start + length:
        start += length
        length *= cycle_mult
    return anneal(1.0, min_factor, (step - start) / length, "cosine")
