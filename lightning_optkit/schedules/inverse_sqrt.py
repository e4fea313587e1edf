# SPDX-License-Identifier: Apache-2.0
r"""Inverse square root decay after a linear warmup of w steps, :math:`\min(t / w, \sqrt{w / t})`.

Source: Vaswani et al. 2017 (Attention Is All You Need), arXiv:1706.03762, section 5.3, equation 3.
Unlike the paper, the peak is scaled to 1, and the ramp starts at `start_factor` (0 gives the paper's).
"""

import math

from lightning_optkit._checks import check_in
from lightning_optkit.schedules._anneal import anneal
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, resolve_length

__all__ = ["inverse_sqrt"]


def inverse_sqrt(warmup: Length = 0.05, start_factor: float = 0.01) -> Schedule:
    """Rises to 1 over `warmup`, then decays as 1 / sqrt(t) without an end: it needs no length of the run.

    Args:
        warmup: Length of the rise: an int >= 1 (steps) or a float in (0, 1] (fraction of the run).
        start_factor: Factor at step 0, in [0, 1]. Not 0 by default, since a first step at rate 0 is a step lost.

    Raises:
        ValueError: if an argument is out of range, or the warmup is longer than the run.

    Example:
        >>> [inverse_sqrt(warmup=4, start_factor=0.0)(t) for t in (0, 2, 4, 16, 64)]
        [0.0, 0.5, 1.0, 0.5, 0.25]
    """
    warmup = check_length("inverse_sqrt", "warmup", warmup)
    start_factor = float(check_in("inverse_sqrt", "start_factor", start_factor, "[0, 1]"))
    return Schedule("inverse_sqrt", _factor, (("warmup", warmup), ("start_factor", start_factor)))


def _factor(step: float, total_steps: float | None, *, warmup: Length, start_factor: float) -> float:
    warmup_steps = resolve_length("inverse_sqrt", "warmup", warmup, total_steps)
    if step < warmup_steps:
        return anneal(start_factor, 1.0, step / warmup_steps, "linear")
    return math.sqrt(warmup_steps / step)
