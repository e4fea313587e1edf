# SPDX-License-Identifier: Apache-2.0
"""The parameters of a step that were updated before it, inside the backward pass (see `step_in_backward`)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_optkit.step.average import Average
from lightning_optkit.step.numbers import is_due
from lightning_optkit.step.segments import Segment

__all__ = ["EarlyUpdates", "early_updates"]


class EarlyUpdates:
    """The updates since the last completed step. It holds no reference to the optimizer."""

    def __init__(self) -> None:
        self.current: dict[Tensor, Segment] = {}
        """The parameters updated since then, with the segment of each."""
        self.last: dict[Tensor, Segment] = {}
        """Those of the last completed step."""
        self.is_clipped = False
        self._clock: int | None = None
        self._num_averaged: int | None = None
        self._is_due = False  # whether the current step updates the averages, once `num_averaged` was asked

    def clock(self, states: Mapping[Tensor, dict[str, Any]]) -> int:
        """The number of completed steps: at first, that of the parameter with the most updates."""
        if self._clock is None:
            steps = [state["step"] for state in states.values() if "step" in state]
            self._clock = int(max(map(float, steps), default=0))
        return self._clock

    def num_averaged(self, states: Mapping[Tensor, dict[str, Any]], average: Average | None) -> int:
        """How often the averages had been updated before this step."""
        self._is_due = is_due(average, self.clock(states) + 1)
        if self._num_averaged is None:
            counted = int(self._is_due)
            counts = {param: float(state["num_averaged"]) for param, state in states.items() if "num_averaged" in state}
            waiting = [count for param, count in counts.items() if param not in self.current]
            updated = [count - counted for param, count in counts.items() if param in self.current]
            self._num_averaged = int(max(waiting + updated, default=0))
        return self._num_averaged

    def recount(self) -> None:
        """Counts the updates of the averages anew, since there is another average."""
        self._num_averaged = None

    def close(self) -> None:
        """Ends the step."""
        self.last, self.current = self.current, {}
        self.is_clipped = False
        if self._num_averaged is not None:
            self._num_averaged += int(self._is_due)
        if self._clock is not None:
            self._clock += 1

    def forget(self) -> None:
        """Discards everything, since state or groups were replaced."""
        self.last, self.current = {}, {}
        self.is_clipped, self._num_averaged, self._clock = False, None, None


def early_updates(optimizer: object) -> EarlyUpdates | None:
    """Those of an optimizer that steps in the backward pass; None for any other."""
    engine = vars(optimizer).get("_engine")
    return None if engine is None else engine.early
