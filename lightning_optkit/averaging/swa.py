# SPDX-License-Identifier: Apache-2.0
"""Stochastic weight averaging: the uniform mean of the weights near the end of training.

Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407,
algorithm 1; the first update (a copy) as in `torch.optim.swa_utils.AveragedModel` with `get_swa_avg_fn`.
"""

import math
from dataclasses import dataclass, replace

from lightning_optkit._checks import check_in, check_int, shown
from lightning_optkit.step import Average
from lightning_optkit.step.rule import AverageKind

__all__ = ["SWA"]


@dataclass(frozen=True)
class SWA(Average):
    """`average <- average + (parameter - average) / (n + 1)` after an optimizer step; the first update copies.

    As part of a step it costs 8 bytes per fp32 parameter. It is stored in `optimizer.state[p]["swa"]`, in fp32 for
    16-bit parameters, so every checkpoint contains it.

    The learning rate during averaging is scheduled separately. Constant, at a fifth of the base value over the last
    quarter: `LRSchedule(join(cosine(0.2), 0.75, constant(0.2)))`. Cyclical, averaged once per cycle of 200 steps:
    `LRSchedule(join(cosine(0.2), 0.75, sgdr(cycle=200)))` with `SWA(0.75, every=200)`. For networks with BatchNorm,
    recompute the statistics of the average: `WeightAveraging(SWA(), update_bn=True)`.

    Args:
        start: First optimizer step, from 1, whose result is averaged; or a float in (0, 1], a fraction of the run.
        every: Optimizer steps between updates (the paper's cycle length c), at least 1.

    Raises:
        ValueError: for an argument out of range.

    Cost: one fp32 number of state per parameter.

    Example:
        >>> SWA(0.75, every=10).for_run(1_000)
        SWA(start=750, every=10)
    """

    start: int | float = 0.75
    every: int = 1

    def __post_init__(self) -> None:
        is_number = isinstance(self.start, int | float) and not isinstance(self.start, bool)
        requirement = "start must be an int >= 1 (optimizer step) or a float in (0, 1] (fraction of the run)."
        if not is_number:
            raise TypeError(f"{type(self).__name__}(start={shown(self.start)}): {requirement}")
        in_range = 0 < self.start <= 1 if isinstance(self.start, float) else 1 <= self.start < 2**63
        if not in_range:
            raise ValueError(f"{type(self).__name__}(start={shown(self.start)}): {requirement}")
        check_int(type(self).__name__, "every", self.every, minimum=1)

    def for_run(self, total_steps: float) -> "SWA":
        """The same average with `start` as an optimizer step of a run of `total_steps`, rounded up.

        Raises:
            ValueError: if `start` is a fraction and the length of the run is unknown.
        """
        if isinstance(self.start, int):
            return self
        check_in(f"{type(self).__name__}.for_run", "total_steps", total_steps, "[0, inf]")
        if not 1 <= total_steps < 2**63:
            raise ValueError(
                f"{type(self).__name__}(start={self.start!r}): start must be an optimizer step where the length "
                "of the run is unknown, "
                f"got total_steps={total_steps!r}."
            )
        return replace(self, start=max(1, math.ceil(round(self.start * total_steps, 6))))

    @property
    def state_name(self) -> str:
        """Its name in `optimizer.state[p]`."""
        return "swa"

    @property
    def kind(self) -> AverageKind:
        """All values have the same weight."""
        return AverageKind.UNIFORM

    @property
    def decay(self) -> float:
        """Not used by this kind."""
        return 0.0
