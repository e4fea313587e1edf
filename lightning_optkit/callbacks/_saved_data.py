# SPDX-License-Identifier: Apache-2.0
"""Whether a run goes on with the data it was saved with, and what of its state holds otherwise."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_optkit.callbacks._data_order import data_order, differences, what_workers_lose
from lightning_optkit.callbacks._reloads import set_reload_epochs
from lightning_optkit.callbacks._rest_of_epoch import can_be_dealt_anew, dealt_anew

__all__ = ["state_for_these_data", "still_to_resume"]


def state_for_these_data(
    trainer: pl.Trainer,
    loaders: list[Any],
    saved: dict[str, Any],
    dealing_of_run: Callable[[], dict[str, Any] | None],
    random_state: Callable[[], dict[str, Any]],
) -> tuple[dict[str, Any] | None, bool]:
    """The state to go on from, None if none can be, and whether that is exact; what is not is said.

    Loaders are made again when the run that was saved would have made them again.

    Args:
        trainer: The Trainer.
        loaders: Those of this run.
        saved: The state of the checkpoint.
        dealing_of_run: How this run deals out its samples, asked if the data are others.
        random_state: That of this process, asked then too.
    """
    if "reloaded" in saved:  # of older versions no checkpoint has it
        set_reload_epochs(trainer, saved["reloaded"])
    before = {"processes": len(saved["ranks"]), **saved.get("loaders", {})}
    here = {"processes": trainer.world_size, **data_order(trainer, loaders)}
    changed = differences(before, here)
    if changed:
        names = {name for name in here if name in before and before[name] != here[name]}
        dealing = dealing_of_run()
        if dealing is None or not can_be_dealt_anew(names, saved.get("dealing"), dealing):
            rank_zero_warn(f"ExactResume: the run was saved with {changed}; it is not exact.")
            return None, False
        saved = dealt_anew(trainer, saved, dealing, random_state())
        once = "" if saved["ranks"][0]["finished"] else "each sample of the epoch is seen once, but "
        others = f"{once}batches and random numbers are others"
        rank_zero_warn(f"ExactResume: the run was saved with {changed}; {others}; it is not exact.")
    lost = what_workers_lose(trainer, loaders, saved)
    for each in lost:
        rank_zero_warn(f"ExactResume: {each}")
    return saved, not (changed or lost or None in saved["ranks"])


def still_to_resume(saved: dict[str, Any], ends_batch: bool) -> dict[str, Any]:
    """What was loaded, for a checkpoint of a fit in which no epoch went on from it.

    Args:
        saved: The state of the checkpoint; empty if there was none.
        ends_batch: Whether what follows the last batch is still to be done.
    """
    stops = {"stops": True} if ends_batch else {}
    return {**saved, "ranks": [each and {**each, **stops} for each in saved["ranks"]]} if saved else {}
