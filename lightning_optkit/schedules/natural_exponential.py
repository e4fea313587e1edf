# SPDX-License-Identifier: Apache-2.0
r"""Natural exponential decay, :math:`\alpha_t = \alpha_0 \exp(-\beta t)`.

Source: Qiu Xipeng, Neural Networks and Deep Learning, section 7.2.3 (natural exponential decay).
"""

import math

from lightning_optkit._checks import check_in
from lightning_optkit.schedules.schedule import Length, Schedule, check_length, resolve_length

__all__ = ["natural_exponential"]


def natural_exponential(beta: float, every: Length = 1) -> Schedule:
    """Decays as exp(-beta t): `exponential`, given the rate instead of the ratio.

    Args:
        beta: Decay rate per `every`, in [0, inf). The factor is 1/e at t = 1 / beta.
        every: Unit of t: an int >= 1 (steps) or a float in (0, 1] (fraction of the run).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> [round(natural_exponential(beta=0.5)(t), 4) for t in (0, 2, 4)]
        [1.0, 0.3679, 0.1353]
    """
    beta = float(check_in("natural_exponential", "beta", beta, "[0, inf)"))
    every = check_length("natural_exponential", "every", every)
    return Schedule("natural_exponential", _factor, (("beta", beta), ("every", every)))


def _factor(step: float, total_steps: float | None, *, beta: float, every: Length) -> float:
    t = step / resolve_length("natural_exponential", "every", every, total_steps, may_exceed_run=True)
    return math.exp(-beta * t)
