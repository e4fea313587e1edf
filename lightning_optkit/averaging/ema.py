# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the parameters.

Source: Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging"; the exponential form and its
first update (a copy) as in `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`; the decay of warm-up
"power" as in timm's `ModelEmaV3` (Katherine Crowson), that of "ratio" as in `tf.train.ExponentialMovingAverage`.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch

from lightning_optkit._checks import check_in, check_int, check_one_of
from lightning_optkit.averaging._start import StartInterval, check_start, started_in_run
from lightning_optkit.step import Average
from lightning_optkit.step.average import AverageKind

__all__ = ["EMA"]


@dataclass(frozen=True, repr=False)
class EMA(Average):
    r"""`average <- decay * average + (1 - decay) * parameter` after an optimizer step; the first update copies.

    As part of a step it moves 8 bytes per parameter. It is stored in `optimizer.state[p]["ema"]`, in fp32 for 16-bit
    parameters too, so every checkpoint contains it. In bfloat16 it takes half of that, and is rounded stochastically:
    its error is about sqrt(d / 2) units in the last place of bfloat16, at least half a unit, where d is the distance of
    the weights from their average in such units.

    The average reaches back over about 1 / (1 - `decay`) updates. With a warm-up, the decay of update t + 1 is

    .. math:: \min(\text{decay},\ 1 - (1 + t / \gamma)^{-p}) \quad\text{or}\quad \min(\text{decay},\ (1 + t) / (10 + t))

    and at least `min_decay`, so that the average forgets the beginning. "power" with p = 2/3 reaches 0.999 after 31,600
    updates, with p = 3/4 after 10,000; "ratio" after 9,000. `HyperparameterSchedule("average_decay", ...)` schedules
    `decay` by any other function.

    Args:
        decay: Weight of the old average, in [0, 1).
        start: First optimizer step, from 1, whose result is averaged; or a float in (0, 1], a fraction of the run.
        every: Optimizer steps between updates, at least 1.
        start_interval: "epoch": `start` counts epochs, from 1, and the first step of that epoch is the first one.
        warmup: "power", "ratio", or None for the same decay always.
        warmup_gamma: Gamma of "power", in (0, inf).
        warmup_power: p of "power", in (0, inf).
        min_decay: Least decay of the warm-up, in [0, 1).
        dtype: torch.float32 or torch.bfloat16, of the average of real parameters of at most 32 bits.

    Raises:
        ValueError: for an argument out of range, or one of the warm-up without it.

    Cost: one number of state per parameter, 4 bytes or 2.

    Example:
        >>> EMA(0.999)
        EMA(decay=0.999, start=1, every=1)
        >>> [round(EMA(0.9999, warmup="power").decay_at(0.9999, t), 4) for t in (1, 100, 31_600, 2_000_000)]
        [0.37, 0.9539, 0.999, 0.9999]
    """

    decay: float = 0.999
    start: int | float = 1
    every: int = 1
    start_interval: StartInterval = "step"
    warmup: Literal["power", "ratio"] | None = None
    warmup_gamma: float = 1.0
    warmup_power: float = 2 / 3
    min_decay: float = 0.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_in(owner, "decay", self.decay, "[0, 1)")
        check_start(owner, self.start, self.start_interval)
        check_int(owner, "every", self.every, minimum=1)
        check_one_of(owner, "warmup", self.warmup, (None, "power", "ratio"))
        check_in(owner, "warmup_gamma", self.warmup_gamma, "(0, inf)")
        check_in(owner, "warmup_power", self.warmup_power, "(0, inf)")
        check_in(owner, "min_decay", self.min_decay, "[0, 1)")
        check_one_of(owner, "dtype", self.dtype, (torch.float32, torch.bfloat16))
        for name in self._changed("warmup_gamma", "warmup_power"):
            if self.warmup != "power":
                raise ValueError(f"{owner}({name}={getattr(self, name)!r}): warmup must be 'power'.")
        if self.min_decay and self.warmup is None:
            raise ValueError(f"{owner}(min_decay={self.min_decay!r}): warmup must be 'power' or 'ratio'.")
        if self.min_decay > self.decay:
            raise ValueError(f"{owner}(min_decay={self.min_decay!r}): min_decay must be at most decay, {self.decay!r}.")

    def __repr__(self) -> str:
        # The name of its state in a checkpoint, so that it must not change with every new argument.
        shown = ["decay", "start", "every", *self._changed(*[field.name for field in fields(self)][3:])]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def _changed(self, *names: str) -> list[str]:
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def for_run(self, total_steps: float, steps_per_epoch: float | None = None) -> "EMA":
        """The same average with `start` as an optimizer step; see `SWA.for_run`."""
        return started_in_run(self, total_steps, steps_per_epoch)

    def decay_at(self, decay: float, num_averaged: int) -> float:
        """The decay of an update after `num_averaged` others, where `decay` is that of the group."""
        if self.warmup is None:
            return decay
        t = num_averaged
        warm = (1 + t) / (10 + t) if self.warmup == "ratio" else 1 - (1 + t / self.warmup_gamma) ** -self.warmup_power
        return max(min(decay, warm), self.min_decay)

    @property
    def state_name(self) -> str:
        """Its name in `optimizer.state[p]`."""
        return "ema"

    @property
    def kind(self) -> AverageKind:
        """A weight of a new value that the decay gives."""
        return AverageKind.EXPONENTIAL
