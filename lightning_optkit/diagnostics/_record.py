# SPDX-License-Identifier: Apache-2.0
"""What is remembered of a training run: curves over optimizer steps, timings, the plan in words."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Curve", "RunRecord"]

_MAX_POINTS = 4_096  # per curve: more cannot be seen in a plot, and a checkpoint stays small


@dataclass
class Curve:
    """Values over optimizer steps, thinned evenly so that a run of any length keeps at most 4,096 of them.

    Args:
        steps: Optimizer steps taken, from 1.
        values: One per step kept.
        every: How many appended values one kept value stands for.
        num_appended: Values appended so far, kept or not.

    Example:
        >>> loss = Curve()
        >>> loss.append(1, 2.5)
        >>> loss.append(2, float("nan"))
        >>> loss.finite()
        ([1], [2.5])
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    every: int = 1
    num_appended: int = 0

    def append(self, step: int, value: float) -> None:
        """Keeps `value`, or every `every`-th one once there are too many."""
        if self.num_appended % self.every == 0:
            self.steps.append(step)
            self.values.append(value)
        self.num_appended += 1
        if len(self.steps) >= _MAX_POINTS:
            del self.steps[1::2], self.values[1::2]
            self.every *= 2

    def finite(self) -> tuple[list[int], list[float]]:
        """Steps and values without those that are inf or NaN."""
        kept = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]
        return [step for step, _ in kept], [value for _, value in kept]


@dataclass
class RunRecord:
    """One training run, as `write_report` shows it and as a checkpoint can hold it.

    Args:
        name: What to call it in the report.
        num_steps: Optimizer steps taken.
        loss: Training loss.
        learning_rate: Parameter group -> rate that the step used.
        grad_norm: Global L2 norm of the gradients before clipping, where it is known.
        grad_norm_clipped: The same after clipping.
        metrics: Name of a validation metric -> its value at the end of each validation.
        step_ms: Wall time from the end of one step to the end of the next (milliseconds).
        timings: What was timed otherwise -> its median (milliseconds).
        explanation: The plan of the step, `str(optimizer.explain())`.

    Example:
        >>> record = RunRecord("plain")
        >>> RunRecord.from_dict(record.to_dict()) == record
        True
    """

    name: str
    num_steps: int = 0
    loss: Curve = field(default_factory=Curve)
    learning_rate: dict[str, Curve] = field(default_factory=dict)
    grad_norm: Curve = field(default_factory=Curve)
    grad_norm_clipped: Curve = field(default_factory=Curve)
    metrics: dict[str, Curve] = field(default_factory=dict)
    step_ms: Curve = field(default_factory=Curve)
    timings: dict[str, float] = field(default_factory=dict)
    explanation: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The record in dicts, lists, numbers and strings."""
        return asdict(self)

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "RunRecord":
        """The record that `to_dict` saved."""
        alone = {name: Curve(**saved[name]) for name in ("loss", "grad_norm", "grad_norm_clipped", "step_ms")}
        named = {
            name: {key: Curve(**curve) for key, curve in saved[name].items()} for name in ("learning_rate", "metrics")
        }
        return RunRecord(**{**saved, **alone, **named, "timings": dict(saved["timings"])})
