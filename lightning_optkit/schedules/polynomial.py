# SPDX-License-Identifier: Apache-2.0
r"""Polynomial decay, :math:`\alpha_t = \alpha_0 (1 - t / T)^p`, the "poly" policy of semantic segmentation.

Source: Liu, Rabinovich and Berg 2015 (ParseNet), arXiv:1506.04579; Chen et al. 2017 (DeepLab), arXiv:1606.00915.
"""

from lightning_optkit._checks import check_in
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, resolve_length

__all__ = ["polynomial"]


def polynomial(power: float = 1.0, min_factor: float = 0.0, steps: Length = 1.0) -> Schedule:
    """Falls from 1 to `min_factor` as a power of the remaining progress, then stays.

    Same as torch's PolynomialLR with total_iters = `steps`.

    Args:
        power: Exponent p, in (0, inf): 1 is linear, above 1 falls early, below 1 falls late.
        min_factor: Factor at the end, in [0, 1].
        steps: Length of the decay: an int >= 1 (steps) or a float in (0, 1] (fraction of the run).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> [polynomial(power=2.0)(t, 4) for t in range(5)]
        [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """
    power = float(check_in("polynomial", "power", power, "(0, inf)"))
    min_factor = float(check_in("polynomial", "min_factor", min_factor, "[0, 1]"))
    steps = check_length("polynomial", "steps", steps)
    return Schedule("polynomial", _factor, (("power", power), ("min_factor", min_factor), ("steps", steps)))


def _factor(step: float, total_steps: float | None, *, power: float, min_factor: float, steps: Length) -> float:
    progress = min(step / resolve_length("polynomial", "steps", steps, total_steps), 1.0)
    return float(min_factor + (1 - min_factor) * (1 - progress) ** power)
