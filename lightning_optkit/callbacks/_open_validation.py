# SPDX-License-Identifier: Apache-2.0
"""A validation that has begun and not ended: a run that goes on from a checkpoint of that time begins it anew.

Lightning runs the rest of it and takes the mean of that for the whole, or leaves it out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl

from lightning_optkit.callbacks._own_buffers import are_replaced
from lightning_optkit.callbacks._reloads import keep_reload_of_validation, reload_epochs
from lightning_optkit.callbacks.seams.lightning_private import (
    VALIDATION_ENDS,
    VALIDATIONS,
    saved_progress,
    validation_of,
)
from lightning_optkit.callbacks.seams.saved_position import complete_last_batch, repeat_batch

__all__ = ["OpenValidation", "begins_after_batch"]


class OpenValidation:
    """Notes that a validation has begun, until its last hook, in which callbacks judge it; not the sanity check.

    Args:
        trainer: The Trainer.
        stand_before: Puts a function before a method, which it receives first, until the fit ends.
    """

    def __init__(self, trainer: pl.Trainer, stand_before: Callable[[object, str, Callable[..., Any]], None]) -> None:
        self.counts_before: dict[str, int] | None = None  # of batches of the epoch's earlier validations
        self.replaced_before = True  # buffers of this process, as `are_replaced` says
        loop, _ = validation_of(trainer)
        stand_before(loop, VALIDATIONS[0], partial(self._begin, trainer))
        stand_before(loop, VALIDATION_ENDS, self._end)

    def _begin(self, trainer: pl.Trainer, run: Callable[[], Any]) -> Any:
        if trainer.sanity_checking:
            return run()
        self.counts_before, reloaded = validation_of(trainer)[1].total.state_dict(), reload_epochs(trainer)
        self.replaced_before = are_replaced(trainer)
        result = run()
        self.counts_before = None
        keep_reload_of_validation(trainer, reloaded)
        return result

    def _end(self, on_end: Callable[[], None]) -> None:
        self.counts_before = None
        on_end()


def begins_after_batch(checkpoint: dict[str, Any], ranks: list[dict[str, Any] | None]) -> bool:
    """Sets the position in a checkpoint to that of a run that was not interrupted.

    Args:
        checkpoint: The checkpoint.
        ranks: The states of ExactResume in it.

    Returns:
        Whether what follows the last batch, as a validation, is still to be done.
    """
    repeat_batch(checkpoint, ranks)
    is_last_hook, validates = complete_last_batch(checkpoint), _begins_validation_anew(checkpoint, ranks)
    return is_last_hook or validates or any(each.get("stops") for each in ranks if each)


def _begins_validation_anew(checkpoint: dict[str, Any], ranks: list[dict[str, Any] | None]) -> bool:
    """Sets the counts of an open validation back to before it, in a checkpoint; whether there is one.

    Args:
        checkpoint: The checkpoint. Its batch is completed, and what follows the batch is still to be done.
        ranks: The states of ExactResume in it.
    """
    begun = [each["validation"] for each in ranks if each and each.get("validation")]
    if begun:
        *_, progress = saved_progress(checkpoint)
        progress["total"].update(begun[0])
        progress["current"].update(dict.fromkeys(progress["current"], 0))
        progress["is_last_batch"] = False
    return bool(begun)
