# SPDX-License-Identifier: Apache-2.0
"""What is remembered of a training run: curves over optimizer steps, timings, the plan in words."""

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
        """The record in dicts, lists, numbers and strings."""
        return asdict(self)

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "RunRecord":
        """The record that `to_dict` saved.

        Raises:
            TypeError: if something in it is of another kind.
            ValueError: if something is missing, or the two halves of a curve differ in length.
        """
        return record_from(saved, "RunRecord.from_dict(saved")


def record_from(saved: Mapping[str, Any], call: str) -> RunRecord:
    """The same for the argument of another `call`, of which the message begins with `Owner.method(argument`."""
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
