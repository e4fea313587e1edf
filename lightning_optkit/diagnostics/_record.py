# SPDX-License-Identifier: Apache-2.0
"""The record of a training run: its settings, curves over optimizer steps, timings, findings, the step's plan."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_optkit._checks import (
    check_in,
    check_instance,
    check_int,
    check_listed,
    check_mapping,
    check_one_of,
    check_path,
    check_state,
    check_text,
    shown,
)
from lightning_optkit.diagnostics._curve import Curve
from lightning_optkit.diagnostics._files import replace_text
from lightning_optkit.diagnostics.verdict import Verdict, verdict_from

__all__ = ["LAYER_QUANTITIES", "Curve", "RunRecord", "record_from"]

_CURVES = ("loss", "step_ms", "elapsed_s")
_NAMED_CURVES = ("learning_rate", "grad_norm", "grad_norm_clipped", "metrics", "logged")
_TEXTS = ("settings", "callbacks", "ended", "environment")
_OF_END = ("by", "when", "where")
_CURVE = "a curve such as Curve([1, 2], [2.0, 1.0])"
LAYER_QUANTITIES = ("grad_norm", "update_ratio", "activation", "closed")


@dataclass
class RunRecord:
    """One training run: input of `write_report`, and storable in a checkpoint or a file.

    Args:
        name: Its name in the report.
        num_steps: Number of optimizer steps.
        loss: Training loss.
        learning_rate: Learning rate of each step, by optimizer and parameter group.
        grad_norm: Global L2 norm of the gradients before clipping, if known, by optimizer.
        grad_norm_clipped: The same as the step used it, by optimizer.
        metrics: Values of each validation metric, one per validation.
        logged: What the module logs in `training_step`, one per step.
        goals: "min" or "max" for each metric that a callback of the run watches.
        layers: Curves by layer of "grad_norm", "update_ratio", "activation" (root mean square of the output) and
            "closed" (share of the units of an activation function that were 0 or flat).
        step_ms: Wall time from the end of one step to the end of the next (milliseconds).
        elapsed_s: Wall time since the start of the training, at the end of each step (seconds).
        timings: Median of every other timing (milliseconds).
        settings: Everything that was set, as text: seed, batch size, epochs, hyperparameters.
        callbacks: Arguments of each callback, by its class.
        clip: The clip by norm, or "".
        explanation: The plan of the step: `str(optimizer.explain())` of each optimizer.
        verdicts: What `GradientHealth` found; None without it.
        ended: What ended the run before its time: "by" (exception and message), "when" and "where"; else empty.
        environment: Facts about the installation, of `environment()`.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if a number is negative, `name` empty, or a goal or a quantity of layers is none of those above.

    Example:
        >>> record = RunRecord("plain", settings={"seed": "1"})
        >>> RunRecord.from_dict(record.to_dict()) == record
        True
    """

    name: str
    num_steps: int = 0
    loss: Curve = field(default_factory=Curve)
    learning_rate: dict[str, Curve] = field(default_factory=dict)
    grad_norm: dict[str, Curve] = field(default_factory=dict)
    grad_norm_clipped: dict[str, Curve] = field(default_factory=dict)
    metrics: dict[str, Curve] = field(default_factory=dict)
    logged: dict[str, Curve] = field(default_factory=dict)
    goals: dict[str, str] = field(default_factory=dict)
    layers: dict[str, dict[str, Curve]] = field(default_factory=dict)
    step_ms: Curve = field(default_factory=Curve)
    elapsed_s: Curve = field(default_factory=Curve)
    timings: dict[str, float] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    callbacks: dict[str, str] = field(default_factory=dict)
    clip: str = ""
    explanation: str = ""
    verdicts: list[Verdict] | None = None
    ended: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_text(owner, "name", self.name, 'a name, such as "plain"')
        check_int(owner, "num_steps", self.num_steps, minimum=0)
        for name in _CURVES:
            check_instance(owner, name, getattr(self, name), Curve, _CURVE)
        for name in _NAMED_CURVES:
            _check_curves(owner, name, getattr(self, name))
        for key, named in check_mapping(owner, "layers", self.layers, 'a dict such as {"grad_norm": {}}').items():
            check_one_of(owner, "layers", key, LAYER_QUANTITIES)
            _check_curves(owner, f"layers[{key!r}]", named)
        timings = check_mapping(owner, "timings", self.timings, 'a dict such as {"step": 1.5}')
        for key, milliseconds in timings.items():
            check_in(owner, f"timings[{key!r}]", milliseconds, "[0, inf]")
        for name in _TEXTS:
            texts = check_mapping(owner, name, getattr(self, name), 'a dict of strings such as {"seed": "1"}')
            for key, text in texts.items():
                check_instance(owner, f"{name}[{key!r}]", text, str, "a string")
        for key in self.ended:
            check_one_of(owner, "ended", key, _OF_END)
        for key, goal in check_mapping(owner, "goals", self.goals, 'a dict such as {"val_loss": "min"}').items():
            check_one_of(owner, f"goals[{key!r}]", goal, ("min", "max"))
        check_instance(owner, "clip", self.clip, str, "a string")
        check_instance(owner, "explanation", self.explanation, str, "a string")
        if self.verdicts is not None:
            self.verdicts = check_listed(owner, "verdicts", self.verdicts, "a list of verdicts, or None", empty=True)
            for verdict in self.verdicts:
                check_instance(owner, "verdicts", verdict, Verdict, "a list of verdicts, or None")

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

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the record into a JSON file, which `load` and `optkit report` read; missing folders are created.

        Args:
            path: The file.

        Returns:
            The file written, as an absolute path.

        Raises:
            TypeError: if `path` is no path.
            ValueError: if it cannot be the name of a file.
        """
        target = check_path("RunRecord.save", "path", path).absolute()
        replace_text(target, json.dumps(self.to_dict()))
        return target

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "RunRecord":
        """The inverse of `save`.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a file of `save`.
        """
        call = f"RunRecord.load(path={shown(str(path))}"
        text = check_path("RunRecord.load", "path", path, exists=True).read_text(encoding="utf-8", errors="replace")
        try:
            saved = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{call}): path must be a record of `RunRecord.save`; it is no JSON ({error}).") from None
        try:
            return record_from(saved, "RunRecord.load(path")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{call}): path must be a record of `RunRecord.save`; {error}") from None


def record_from(saved: Mapping[str, Any], call: str) -> RunRecord:
    """The same for the argument of another `call`; the message begins with `Owner.method(argument`."""
    plain: dict[str, Any] = {"name": str, "num_steps": int, "clip": str, "explanation": str}
    copied: dict[str, Any] = dict.fromkeys((*_TEXTS, "goals", "timings"), Mapping)
    del copied["ended"]  # which records of former versions lack
    curves = dict.fromkeys((*_CURVES, *_NAMED_CURVES, "layers"), Mapping)
    check_state(call, saved, **plain, **copied, **curves, verdicts=(list, type(None)))
    made: dict[str, Any] = {name: saved[name] for name in plain}
    made |= {name: dict(saved[name]) for name in copied}
    made["ended"] = check_state(call, {"ended": {}, **saved}, ended=Mapping)["ended"]
    made |= {name: _curve(call, name, saved[name]) for name in _CURVES}
    made |= {name: _curves(call, name, saved[name]) for name in _NAMED_CURVES}
    made["layers"] = {key: _curves(call, f"layers[{key!r}]", named) for key, named in saved["layers"].items()}
    if saved["verdicts"] is not None:
        made["verdicts"] = [verdict_from(each, f"{call}['verdicts']") for each in saved["verdicts"]]
    try:
        return RunRecord(**made)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{call}=...): it must be what to_dict gave; {error}") from None


def _check_curves(owner: str, name: str, value: Any) -> None:
    for key, curve in check_mapping(owner, name, value, 'a dict such as {"val_loss": Curve()}').items():
        check_instance(owner, f"{name}[{key!r}]", curve, Curve, _CURVE)


def _curves(call: str, name: str, saved: Any) -> dict[str, Curve]:
    if not isinstance(saved, Mapping):
        raise TypeError(f"{call}[{name!r}]={shown(saved)}): it must be what to_dict gave, a dict of curves.")
    return {str(key): _curve(call, name, curve) for key, curve in saved.items()}


def _curve(call: str, name: str, saved: Any) -> Curve:
    kinds: dict[str, Any] = {"steps": list, "values": list, "every": int, "num_appended": int}
    checked = check_state(f"{call}[{name!r}]", saved, **kinds)
    try:
        return Curve(**{key: checked[key] for key in kinds})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{call}[{name!r}]=...): it must be what to_dict gave; {error}") from None
