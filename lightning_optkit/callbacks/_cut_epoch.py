# SPDX-License-Identifier: Apache-2.0
"""What a stop changes that a run which goes on does not: the hooks of an epoch's end although batches are left, and a
validation that only the stop has made.
"""

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from lightning_optkit.callbacks._metrics_so_far import metrics_so_far
from lightning_optkit.callbacks._open_window import OpenWindow
from lightning_optkit.callbacks._same_state import is_same_state
from lightning_optkit.callbacks.seams.lightning_private import is_cut, last_metrics

__all__ = ["CutEpoch"]

_RATES = ("lr", "initial_lr")  # what a schedule lowers that judges a metric


class CutEpoch:
    """The callbacks that judge a metric (they have a `monitor`), learning rates and metrics, before an epoch's end.

    Checkpoint callbacks are left out: their state describes files. So are all others: an average may be as large as
    the weights.

    An epoch with all its batches ends once, so what its end changes is kept. It ends with the rates and metrics before
    the validation that the stop has made, as the run does that is not stopped.

    Args:
        trainer: The Trainer, before the last hooks of the epoch, and before a validation that only the stop has made.
        window: Its gradients are kept too: before that validation, Lightning clears those of manual optimization, and
            after it FSDP2 shows other parameters.
        validates: Whether that validation follows.
    """

    def __init__(self, trainer: pl.Trainer, window: OpenWindow, validates: bool = False) -> None:
        untyped: Any = trainer  # Lightning does not declare the attribute
        self._judges = [
            each for each in untyped.callbacks if hasattr(each, "monitor") and not isinstance(each, Checkpoint)
        ]
        self._states = _states(self._judges)
        self._is_whole = not is_cut(trainer)
        self._before = _rates(trainer)
        self._after: list[list[dict[str, float]]] | None = None
        self.validates = validates  # until the batch has ended, with what follows it
        self._last = dict(last_metrics(trainer))
        self._validated: dict[str, torch.Tensor] | None = None  # the metrics of that validation
        self._metrics, self.gradients = metrics_so_far(trainer), window.gradients(trainer, is_unfinished=False)

    def has_validated(self, trainer: pl.Trainer) -> None:
        """Called after that validation: what follows it judges the metrics before, at the rates before."""
        metrics = last_metrics(trainer)
        self._validated = {name: value for name, value in metrics.items() if value is not self._last.get(name)}
        metrics.clear()
        metrics.update(self._last)
        for optimizer, groups in zip(trainer.optimizers, self._before, strict=False):
            for group, before in zip(optimizer.param_groups, groups, strict=False):
                group.update({name: rate for name, rate in before.items() if float(group[name]) != rate})
        if self._is_whole:  # those that judge the epoch's end do so after it
            judged = _states(self._judges)
            self._states = {key: state for key, state in self._states.items() if not is_same_state(state, judged[key])}

    def batch_has_ended(self, trainer: pl.Trainer) -> None:
        """Called after the schedulers' steps that follow the batch."""
        self.validates = False
        self._before = _rates(trainer)
        if not self._is_whole:
            self._show_validation(trainer)

    def has_ended(self, trainer: pl.Trainer) -> None:
        """Called after the last hooks of the epoch."""
        self._after = _rates(trainer)
        if self._is_whole:
            self._before = self._after
            self._show_validation(trainer)

    def metrics(self, now: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a run that goes on has measured; `now` is asked for that of this moment."""
        if not self._is_whole or self._validated is None:
            return self._metrics
        measured = now()
        of_validation = {name: self._metrics["last"].get(name) for name in self._validated}
        last = {**measured["last"], **of_validation}
        return {**measured, "last": {name: value for name, value in last.items() if value is not None}}

    def put_into(self, checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
        """Replaces in a checkpoint what the end of the epoch has changed; rates that the fit's end sets are kept."""
        states = checkpoint.get("callbacks", {})
        for key, state in self._states.items():
            if key in states:  # "restored" says which weights are in the file
                states[key] = {**state, **{name: states[key][name] for name in ("restored",) if name in states[key]}}
        now = self._after or _rates(trainer)
        optimizers = zip(checkpoint.get("optimizer_states", ()), self._before, now, strict=False)
        for optimizer, groups_before, groups_after in optimizers:
            groups = zip(optimizer.get("param_groups", ()), groups_before, groups_after, strict=False)  # of one rank
            for group, before, after in groups:
                group.update(
                    {
                        name: before[name]
                        for name in before
                        if before[name] != after[name] and group[name] == after[name]
                    }
                )

    def _show_validation(self, trainer: pl.Trainer) -> None:
        last_metrics(trainer).update(self._validated or {})


def _rates(trainer: pl.Trainer) -> list[list[dict[str, float]]]:
    """Of each group of each optimizer."""
    return [
        [{name: float(group[name]) for name in _RATES if name in group} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]


def _states(judges: list[Any]) -> dict[str, Any]:
    return {judge.state_key: copy.deepcopy(judge.state_dict()) for judge in judges}
