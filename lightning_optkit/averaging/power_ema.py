# SPDX-License-Identifier: Apache-2.0
"""Average with a power-function profile: its length is a fraction of the run so far, whatever the length of the run.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696,
Section 3.1 and Appendix C.1-C.2 (the profile, its standard deviation, and the decay of an update).
"""

import math
from dataclasses import dataclass
from functools import cache

from lightning_optkit._checks import check_in, check_int
from lightning_optkit.averaging._start import StartInterval, check_start, started_in_run
from lightning_optkit.step import Average
from lightning_optkit.step.average import AverageKind

__all__ = ["LARGEST_STD", "PowerEMA", "power_exponent"]

LARGEST_STD = 12**-0.5
"""The relative standard deviation of equal weights, exponent 0."""


@dataclass(frozen=True)
class PowerEMA(Average):
    r"""`average <- decay * average + (1 - decay) * parameter`, where update n has the decay (1 - 1 / n)^(gamma + 1).

    The value of update t has a weight in proportion to :math:`t^\gamma`: the beginning is forgotten, and the average
    spans the same part of a short and of a long run. Two of them, stored now and then, give the average of any length
    after the run, see `post_hoc_ema`.

    As part of a step it costs 8 bytes per fp32 parameter. It is stored in `optimizer.state[p]["power_ema"]`, in fp32
    for 16-bit parameters, so every checkpoint contains it.

    Args:
        std: Standard deviation of the weights over time, as a fraction of the run so far, in [1e-4, 0.288]; the paper
            stores 0.05 and 0.1. 0.05 is a gamma of 16.97.
        start: First optimizer step, from 1, whose result is averaged; or a float in (0, 1], a fraction of the run.
        every: Optimizer steps between updates, at least 1.
        start_interval: See `EMA`.

    Raises:
        ValueError: for an argument out of range.

    Cost: one fp32 number of state per parameter.

    Example:
        >>> [round(PowerEMA(0.1).decay_at(0.0, n), 4) for n in (0, 1, 10, 1000)]
        [0.0, 0.0041, 0.4693, 0.9921]
    """

    std: float = 0.1
    start: int | float = 1
    every: int = 1
    start_interval: StartInterval = "step"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_in(owner, "std", self.std, "[1e-4, 0.288]")
        check_start(owner, self.start, self.start_interval)
        check_int(owner, "every", self.every, minimum=1)

    def for_run(self, total_steps: float, steps_per_epoch: float | None = None) -> "PowerEMA":
        """The same average with `start` as an optimizer step; see `SWA.for_run`."""
        return started_in_run(self, total_steps, steps_per_epoch)

    def decay_at(self, decay: float, num_averaged: int) -> float:
        """The decay of the profile; that of the group is not used."""
        return float((num_averaged / (num_averaged + 1)) ** (power_exponent(self.std) + 1))

    @property
    def state_name(self) -> str:
        """Its name in `optimizer.state[p]`."""
        return "power_ema"

    @property
    def kind(self) -> AverageKind:
        """A weight of a new value that the decay gives."""
        return AverageKind.EXPONENTIAL

    @property
    def decay(self) -> float:
        """Not used: every update has its own."""
        return 0.0


@cache
def power_exponent(std: float) -> float:
    """Gamma of the profile with this relative standard deviation, in (0, 12^(-1/2)]; Equation 123 solved for gamma."""
    low, high = 0.0, 1 / std  # std decreases in gamma, and is less than 1 / (gamma + 2)
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        if math.sqrt((middle + 1) / (middle + 3)) / (middle + 2) > std:
            low = middle
        else:
            high = middle
