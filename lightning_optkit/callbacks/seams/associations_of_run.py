# SPDX-License-Identifier: Apache-2.0
"""Whether predictions go with their targets, for samples that were never trained on: training's first, validation's."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_optkit.callbacks.seams.lightning_private import is_compiled
from lightning_optkit.callbacks.seams.overrides import override, restore
from lightning_optkit.callbacks.seams.watched_method import WatchedMethod
from lightning_optkit.diagnostics._guard import Guarding, unguarded
from lightning_optkit.diagnostics._signals import AssociationSeen
from lightning_optkit.diagnostics.measure.associations import CalledAssociations

__all__ = ["AssociationsOfRun"]

_SINCE = 0.5  # of what comes before the first validation; earlier, the network has learned less than that meets
_MOST_BATCHES = 32


class AssociationsOfRun:
    """Watches `training_step` in batches of the second half of what precedes the first validation, if that is in the
    first epoch, and `validation_step` in that validation. A compiled module is let be. `guard` stands around what it
    does in these steps.
    """

    def __init__(self, guard: Guarding = unguarded) -> None:
        self._fresh, self._held = CalledAssociations(guard), CalledAssociations(guard)
        self._open: tuple[pl.LightningModule, str, Any] | None = None
        self.is_over = False  # nothing more is watched

    def before_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Watches the batch if it is one of those; to be followed by `close`."""
        if self.is_over or trainer.current_epoch > 0:
            return
        length = min(trainer.num_training_batches, trainer.val_check_batch or float("inf"))
        since = int(_SINCE * length) if length != float("inf") else 0
        every = max(1, (int(length) - since) // _MOST_BATCHES) if since else 0
        if every and batch_idx >= since and (batch_idx - since) % every == 0:
            self._watch(pl_module, "training_step", self._fresh)

    def before_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watches the first validation; to be followed by `close`."""
        if not self.is_over and trainer.current_epoch == 0:
            self._watch(pl_module, "validation_step", self._held)

    def close(self) -> None:
        """Watches no longer; no-op the second time."""
        if self._open is not None:
            restore(*self._open)
            self._open = None

    def seen(self) -> tuple[AssociationSeen | None, AssociationSeen | None]:
        """Those of training and of validation; to be asked after the first validation, behind which nothing is seen."""
        self.is_over = True
        return self._fresh.seen(), self._held.seen()

    def _watch(self, pl_module: pl.LightningModule, name: str, called: CalledAssociations) -> None:
        if is_compiled(pl_module):
            return
        is_training, batches = name == "training_step", list[None]()

        def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if is_training and batches:  # the same batch again, for a closure or another point
                return original(*args, **kwargs)
            batches.append(None)
            called.next_batch()
            with called:
                return original(*args, **kwargs)

        self._open = pl_module, name, WatchedMethod(pl_module, name, step)
        override(*self._open)
