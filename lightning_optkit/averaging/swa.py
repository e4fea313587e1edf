# SPDX-License-Identifier: Apache-2.0
"""Stochastic weight averaging: the uniform mean of the weights near the end of training.

Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407,
algorithm 1; the first update (a copy) as in `torch.optim.swa_utils.AveragedModel` with `get_swa_avg_fn`.
"""

from dataclasses import dataclass

from lightning_optkit._checks import check_int
from lightning_optkit.averaging._start import StartInterval, check_start, started_in_run
from lightning_optkit.step import Average
from lightning_optkit.step.average import AverageKind

__all__ = ["SWA"]


@dataclass(frozen=True, repr=False)
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
        start_interval: "epoch": `start` counts epochs, from 1, and the first step of that epoch is the first one.

    Raises:
        ValueError: for an argument out of range.

    Cost: one fp32 number of state per parameter.

    Example:
        >>> SWA(0.75, every=10).for_run(1_000)
        SWA(start=750, every=10)
    """

    start: int | float = 0.75
    every: int = 1
    start_interval: StartInterval = "step"

    def __post_init__(self) -> None:
        check_start(type(self).__name__, self.start, self.start_interval)
        check_int(type(self).__name__, "every", self.every, minimum=1)

    def __repr__(self) -> str:
        # The name of its state in a checkpoint, so that it must not change with every new argument.
        interval = "" if self.start_interval == "step" else f", start_interval={self.start_interval!r}"
        return f"{type(self).__name__}(start={self.start!r}, every={self.every!r}{interval})"

    def for_run(self, total_steps: float, steps_per_epoch: float | None = None) -> "SWA":
        """The same average with `start` as an optimizer step of a run of `total_steps`, rounded up.

        Args:
            total_steps: Optimizer steps of the run.
            steps_per_epoch: Optimizer steps of an epoch, where `start` counts epochs.

        Raises:
            ValueError: if `start` is a fraction and the length of the run is unknown, or an epoch and its length is.
        """
        return started_in_run(self, total_steps, steps_per_epoch)

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
