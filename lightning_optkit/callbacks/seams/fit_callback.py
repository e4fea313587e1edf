# SPDX-License-Identifier: Apache-2.0
"""The base of callbacks that change a run during a fit."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit._checks import shown
from lightning_optkit.callbacks.seams.arguments_text import arguments_text
from lightning_optkit.callbacks.seams.left_out_average import go_on_from_trained
from lightning_optkit.callbacks.seams.overrides import override, restore
from lightning_optkit.callbacks.seams.run_free import RunFree

__all__ = ["FitCallback"]


class FitCallback(RunFree, Callback):
    """Undoes all its changes when the fit ends, normally or with an exception.

    A subclass calls `_at_end(undo)` for each change. Changes are undone in reverse order, each once, and an undo that
    fails does not prevent the others, nor does it hide the exception that ended the fit.
    """

    _undos: tuple[Callable[[], object], ...] = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({arguments_text(self)})"

    def _at_end(self, undo: Callable[[], object]) -> None:
        """Calls `undo()` when the fit ends."""
        self._undos = (*self._undos, undo)

    def _override(self, owner: object, name: str, function: Callable[..., Any]) -> None:
        """Makes `owner.<name>` call `function` until the fit ends."""
        override(owner, name, function)
        self._at_end(partial(restore, owner, name, function))

    def _stand_before(self, owner: object, name: str, method: Callable[..., Any]) -> None:
        """Like `_override`; `method` receives the original, then its arguments."""
        self._override(owner, name, partial(method, getattr(owner, name)))

    def _undo(self) -> None:
        """Undoes all current changes."""
        undos, self._undos = self._undos, ()
        with ExitStack() as stack:
            stack.callback(self._release)
            for undo in undos:
                stack.callback(undo)

    def _release(self) -> None:
        """Called after the undo, to drop references to the run. Override it to keep what is read after the fit."""
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has made no changes, and has nothing to undo."""
        state = super().__getstate__()
        state.pop("_undos", None)
        return state

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.training:
            go_on_from_trained(trainer, pl_module, checkpoint)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            self._undo()
        except Exception as error:  # which must not take the place of the user's
            with suppress(Warning):  # where warnings are errors
                rank_zero_warn(
                    f"{type(self).__name__}: not all of its changes could be undone after the "
                    f"{type(exception).__name__} ({type(error).__name__}: {shown(str(error))}); make a new module and "
                    "Trainer for another fit."
                )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._undo()
