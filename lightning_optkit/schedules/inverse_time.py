# SPDX-License-Identifier: Apache-2.0
r"""Inverse time decay, :math:`\alpha_t = \alpha_0 / (1 + \beta t)`.

Source: Qiu Xipeng, Neural Networks and Deep Learning, section 7.2.3 (inverse time decay).
"""

from lightning_optkit._checks import check_in
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, resolve_length

__all__ = ["inverse_time"]


def inverse_time(beta: float, every: Length = 1) -> Schedule:
    """Decays as 1 / (1 + beta t): fast at first, then ever more slowly, without an end.

    Args:
        beta: Decay rate per `every`, in [0, inf). The factor is 1/2 at t = 1 / beta.
        every: Unit of t: an int >= 1 (steps) or a float in (0, 1] (fraction of the run).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> [inverse_time(beta=1.0)(t) for t in (0, 1, 3)]
        [1.0, 0.5, 0.25]
    """
    beta = float(check_in("inverse_time", "beta", beta, "[0, inf)"))
    every = check_length("inverse_time", "every", every)
    return Schedule("inverse_time", _factor, (("beta", beta), ("every", every)))


def _factor(step: float, total_steps: float | None, *, beta: float, every: Length) -> float:
    t = step / resolve_length("inverse_time", "every", every, total_steps, may_exceed_run=True)
    return 1 / (1 + beta * t)
