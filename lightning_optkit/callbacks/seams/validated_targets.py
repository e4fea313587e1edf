# SPDX-License-Identifier: Apache-2.0
"""The targets of the first validation of a fit, as its loss function is given them."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_optkit.callbacks.seams.lightning_private import is_compiled
from lightning_optkit.callbacks.seams.overrides import override, restore
from lightning_optkit.callbacks.seams.watched_method import WatchedMethod
from lightning_optkit.diagnostics._guard import Guarding, unguarded
from lightning_optkit.diagnostics._signals import TargetsSeen
from lightning_optkit.diagnostics.measure.targets import CalledTargets

__all__ = ["ValidatedTargets"]


class ValidatedTargets:
    """Watches `validation_step` from its creation on, until `close`; a compiled module is let be.

    Args:
        pl_module: The module, before a validation.
        guard: What stands around what it does in its steps.
    """

    def __init__(self, pl_module: pl.LightningModule, guard: Guarding = unguarded) -> None:
        self._module, self._called = pl_module, CalledTargets(guard)
        self._step = WatchedMethod(pl_module, "validation_step", self._watching)
        self._is_watched = not is_compiled(pl_module)
        if self._is_watched:
            override(pl_module, "validation_step", self._step)

    def close(self) -> None:
        """Watches no longer; no-op the second time."""
        restore(self._module, "validation_step", self._step)

    def _watching(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._called.next_batch()
        with self._called:
            return original(*args, **kwargs)

    def seen(self) -> TargetsSeen | None:
        """The targets; None if unknown."""
        return self._called.seen()
