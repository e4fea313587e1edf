# SPDX-License-Identifier: Apache-2.0
"""The record of a training run: curves over optimizer steps, timings, the step's explanation."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_optkit._checks import (
    check_in,
    check_instance,
    check_int,
    check_listed,
    check_mapping,
    check_state,
    check_text,
)

__all__ = ["Curve", "RunRecord", "record_from"]

_CURVES = ("loss", "grad_norm", "grad_norm_clipped", "step_ms")
_NAMED_CURVES = ("learning_rate", "metrics")
_CURVE = "a curve such as Curve([1, 2], [2.0, 1.0])"
_MAX_POINTS = 4_096  # per curve: more are not visible in a plot, and would enlarge checkpoints


@dataclass
class Curve:
    """Values over optimizer steps, thinned evenly to at most 4,096 for a run of any length.

    Args:
        steps: Optimizer steps taken, from 1.
        values: One per kept step.
        every: Number of appended values per kept value.
        num_appended: Number of values appended so far, kept or not.

    Raises:
        TypeError: if `steps` or `values` is not a list of numbers.
        ValueError: if the two differ in length, or a count is out of range.

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

    def __post_init__(self) -> None:
        for name, numbers in (("steps", self.steps), ("values", self.values)):
            listed = check_listed(type(self).__name__, name, numbers, "a list of numbers, such as [1, 2]", empty=True)
            for number in listed:
                if not (isinstance(number, float) and math.isnan(number)):
                    check_in(type(self).__name__, name, number, "[-inf, inf]")
            setattr(self, name, listed)
        if len(self.steps) != len(self.values):
            raise ValueError(
                f"{type(self).__name__}(values=<{len(self.values)}>): values must be as many as steps, "
                f"{len(self.steps)}."
            )
        check_int(type(self).__name__, "every", self.every, minimum=1)
        check_int(type(self).__name__, "num_appended", self.num_appended, minimum=0)

    def append(self, step: int, value: float) -> None:
        """Keeps `value`, or only every `every`-th one if there are too many."""
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
    """One training run: input of `write_report`, and storable in a checkpoint.

    Args:
        name: Its name in the report.
        num_steps: Number of optimizer steps.
        loss: Training loss.
        learning_rate: Learning rate of each step, by parameter group.
        grad_norm: Global L2 norm of the gradients before clipping, if known.
        grad_norm_clipped: The same after clipping.
        metrics: Values of each validation metric, one per validation.
        step_ms: Wall time from the end of one step to the end of the next (milliseconds).
        timings: Median of every other timing (milliseconds).
        explanation: `str(optimizer.explain())`.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if a number is negative, or `name` empty.

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

    def __post_init__(self) -> None:
        check_text(type(self).__name__, "name", self.name, 'a name, such as "plain"')
        check_int(type(self).__name__, "num_steps", self.num_steps, minimum=0)
        for name in _CURVES:
            check_instance(type(self).__name__, name, getattr(self, name), Curve, _CURVE)
        for name in _NAMED_CURVES:
            named = check_mapping(
                type(self).__name__, name, getattr(self, name), 'a dict such as {"val_loss": Curve()}'
            )
            for key, curve in named.items():
                check_instance(type(self).__name__, f"{name}[{key!r}]", curve, Curve, _CURVE)
        timings = check_mapping(type(self).__name__, "timings", self.timings, 'a dict such as {"step": 1.5}')
        for key, milliseconds in timings.items():
            check_in(type(self).__name__, f"timings[{key!r}]", milliseconds, "[0, inf]")
        check_instance(type(self).__name__, "explanation", self.explanation, str, "a string")

    def to_dict(self) -> dict[str, Any]:
        """The record as dicts, lists, numbers and strings."""
        return asdict(self)

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "RunRecord":
        """The inverse of `to_dict`.

        Raises:
            TypeError: if a value has a wrong type.
            ValueError: if a value is missing, or the two lists of a curve differ in length.
        """
        return record_from(saved, "RunRecord.from_dict(saved")


def record_from(saved: Mapping[str, Any], call: str) -> RunRecord:
    """The same for the argument of another `call`; the message begins with `Owner.method(argument`."""
    kinds: dict[str, Any] = {"name": str, "num_steps": int, "timings": Mapping, "explanation": str}
    check_state(call, saved, **kinds, **dict.fromkeys((*_CURVES, *_NAMED_CURVES), Mapping))
    alone: dict[str, Any] = {name: _curve(call, name, saved[name]) for name in _CURVES}
    named: dict[str, Any] = {
        name: {str(key): _curve(call, name, curve) for key, curve in saved[name].items()} for name in _NAMED_CURVES
    }
    plain: dict[str, Any] = {name: saved[name] for name in ("name", "num_steps", "explanation")}
    try:
        return RunRecord(**plain, **alone, **named, timings=dict(saved["timings"]))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{call}=...): it must be what to_dict gave; {error}") from None


def _curve(call: str, name: str, saved: Any) -> Curve:
    kinds: dict[str, Any] = {"steps": list, "values": list, "every": int, "num_appended": int}
    checked = check_state(f"{call}[{name!r}]", saved, **kinds)
    try:
        return Curve(**{key: checked[key] for key in kinds})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{call}[{name!r}]=...): it must be what to_dict gave; {error}") from None
