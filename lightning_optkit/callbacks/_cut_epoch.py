# SPDX-License-Identifier: Apache-2.0
"""What the end of an epoch changes although the epoch is cut short, and will end once more when the run goes on."""

import copy
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from lightning_optkit.callbacks._metrics_so_far import metrics_so_far
from lightning_optkit.callbacks._open_window import OpenWindow

__all__ = ["CutEpoch"]

_RATES = ("lr", "initial_lr")  # what a schedule lowers that judges a metric


class CutEpoch:
    """The callbacks that judge a metric (they have a `monitor`), learning rates and metrics, before an epoch's end.

    Checkpoint callbacks are left out: their state describes files. So are all others: an average may be as large as
    the weights.

    Args:
        trainer: The Trainer, before the last hooks of the epoch, and before a validation that only the stop has made.
        window: Its gradients are kept too: before that validation, Lightning clears those of manual optimization, and
            after it FSDP2 shows other parameters.
    """

    def __init__(self, trainer: pl.Trainer, window: OpenWindow) -> None:
        untyped: Any = trainer  # Lightning does not declare the attribute
        judges = [each for each in untyped.callbacks if hasattr(each, "monitor") and not isinstance(each, Checkpoint)]
        self._states = {judge.state_key: copy.deepcopy(judge.state_dict()) for judge in judges}
        self._before = _rates(trainer)
        self._after: list[list[dict[str, float]]] | None = None
        self.metrics, self.gradients = metrics_so_far(trainer), window.gradients(trainer, is_unfinished=False)

    def has_ended(self, trainer: pl.Trainer) -> None:
        """Called after those hooks."""
        self._after = _rates(trainer)

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


def _rates(trainer: pl.Trainer) -> list[list[dict[str, float]]]:
    """Of each group of each optimizer."""
    return [
        [{name: float(group[name]) for name in _RATES if name in group} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
