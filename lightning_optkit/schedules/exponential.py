# SPDX-License-Identifier: Apache-2.0
r"""Exponential decay, :math:`\alpha_t = \alpha_0 \beta^t`.

Source: Qiu Xipeng, Neural Networks and Deep Learning, section 7.2.3 (exponential decay).
"""

from lightning_optkit._checks import check_in
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, resolve_length

__all__ = ["exponential"]


def exponential(beta: float, every: Length = 1) -> Schedule:
    """Multiplies the factor by `beta` once per `every`, continuously in between.

    With `every=1` this is torch's ExponentialLR, whose gamma is `beta`.

    Args:
        beta: Ratio of the factors one `every` apart, in (0, 1].
        every: Unit of t: an int >= 1 (steps) or a float in (0, 1] (fraction of the run).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> [exponential(beta=0.5, every=10)(t) for t in (0, 10, 20)]
        [1.0, 0.5, 0.25]
    """
    beta = float(check_in("exponential", "beta", beta, "(0, 1]"))
    every = check_length("exponential", "every", every)
    return Schedule("exponential", _factor, (("beta", beta), ("every", every)))


def _factor(step: float, total_steps: float | None, *, beta: float, every: Length) -> float:
    t = step / resolve_length("exponential", "every", every, total_steps, may_exceed_run=True)
    return float(beta**t)
