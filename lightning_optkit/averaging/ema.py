# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the parameters.

Source: Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging"; the exponential form and its
first update (a copy) as in `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`.
"""

from dataclasses import dataclass

from lightning_optkit._checks import check_in, check_int
from lightning_optkit.step import Average
from lightning_optkit.step.rule import AverageKind

__all__ = ["EMA"]


@dataclass(frozen=True)
class EMA(Average):
    """`average <- decay * average + (1 - decay) * parameter` after an optimizer step; the first update copies.

    As part of a step it costs 8 bytes per fp32 parameter. It is stored in `optimizer.state[p]["ema"]`, in fp32 for
    16-bit parameters, so every checkpoint contains it.

    To warm up the decay, schedule it: `HyperparameterSchedule("average_decay", linear(0.9, 1.0))` together with
    `WeightAveraging(EMA(0.999))`.

    Args:
        decay: Weight of the old average, in [0, 1).
        start: First optimizer step, from 1, whose result is averaged.
        every: Optimizer steps between updates, at least 1.

    Raises:
        ValueError: for an argument out of range.

    Cost: one fp32 number of state per parameter.

    Example:
        >>> EMA(0.999)
        EMA(decay=0.999, start=1, every=1)
    """

    decay: float = 0.999
    start: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        check_in(type(self).__name__, "decay", self.decay, "[0, 1)")
        check_int(type(self).__name__, "start", self.start, minimum=1)
        check_int(type(self).__name__, "every", self.every, minimum=1)

    @property
    def state_name(self) -> str:
        """Its name in `optimizer.state[p]`."""
        return "ema"

    @property
    def kind(self) -> AverageKind:
        """Constant weight of a new value."""
        return AverageKind.EXPONENTIAL
