# SPDX-License-Identifier: Apache-2.0
"""The interface of an average of the parameters that is kept in their state."""

from abc import ABC, abstractmethod
from enum import IntEnum

import torch

__all__ = ["Average", "AverageKind", "KeptInState"]


class AverageKind(IntEnum):
    """The weighting of an average; as in csrc/core/tables.h."""

    NONE = 0
    EXPONENTIAL = 1
    UNIFORM = 2


class KeptInState(ABC):
    """An average of the parameters in `optimizer.state[p]`, updated by the step or separately."""

    @property
    @abstractmethod
    def state_name(self) -> str:
        """Its name in `optimizer.state[p]`."""

    @property
    @abstractmethod
    def start(self) -> int | float:
        """First optimizer step, from 1, whose result is averaged; a float is a fraction of a run."""

    @property
    @abstractmethod
    def every(self) -> int:
        """Optimizer steps between updates of the average."""

    @property
    def start_interval(self) -> str:
        """What an int `start` counts: "step" or "epoch"."""
        return "step"


class Average(KeptInState):
    """An average of the parameters that the step can keep, such as `EMA` (see `lightning_optkit.averaging`)."""

    @property
    @abstractmethod
    def kind(self) -> AverageKind:
        """The weighting of a new value."""

    @property
    @abstractmethod
    def decay(self) -> float:
        """Weight of the old average in the exponential kind, in [0, 1)."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype for real parameters of at most 32 bits; in 16 bits it is rounded stochastically."""
        return torch.float32

    def decay_at(self, decay: float, num_averaged: int) -> float:
        """The weight of the old average in an update after `num_averaged` others; the first one copies.

        Args:
            decay: The `average_decay` of the group, which is `self.decay` unless it is scheduled.
            num_averaged: Updates so far.
        """
        return decay
