# SPDX-License-Identifier: Apache-2.0
r"""Cosine decay, :math:`\alpha_t = \frac{1}{2} \alpha_0 (1 + \cos(t \pi / T))`.

Source: Loshchilov and Hutter 2017 (SGDR), arXiv:1608.03983, equation 5, without restarts; Qiu Xipeng, Neural Networks
and Deep Learning, section 7.2.3 (cosine decay).
"""

from lightning_optkit._checks import check_in
from lightning_optkit.schedules._anneal import anneal
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, resolve_length

__all__ = ["cosine"]


def cosine(min_factor: float = 0.0, steps: Length = 1.0) -> Schedule:
    """Falls from 1 to `min_factor` along half a cosine, then stays.

    Same as torch's CosineAnnealingLR with T_max = `steps`, which however rises again after T_max.

    Args:
        min_factor: Factor at the end, in [0, 1].
        steps: Length of the decay: an int >= 1 (steps) or a float in (0, 1] (fraction of the run).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> [round(cosine()(t, 4), 3) for t in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    min_factor = float(check_in("cosine", "min_factor", min_factor, "[0, 1]"))
    steps = check_length("cosine", "steps", steps)
    return Schedule("cosine", _factor, (("min_factor", min_factor), ("steps", steps)))


def _factor(step: float, total_steps: float | None, *, min_factor: float, steps: Length) -> float:
    progress = min(step / resolve_length("cosine", "steps", steps, total_steps), 1.0)
    return anneal(1.0, min_factor, progress, "cosine")
