# SPDX-License-Identifier: Apache-2.0
"""The position of a run in its checkpoint, as an uninterrupted run would have it and Lightning does not."""

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_optkit.callbacks.seams.lightning_private import saved_progress

__all__ = ["complete_last_batch", "end_epoch_without_batch", "reopen_cut_epoch", "repeat_batch"]


def reopen_cut_epoch(checkpoint: dict[str, Any], is_exact: bool) -> None:
    """Makes the epoch within which a run was stopped the current one again, in a checkpoint.

    Lightning counts it as finished (`max_steps`, `max_time`, `should_stop`), and would go on with the next.

    Args:
        checkpoint: The checkpoint.
        is_exact: Whether it has a state of ExactResume; otherwise it stays as it is, and a warning says so.
    """
    batches, epochs, _ = saved_progress(checkpoint)
    is_within = batches["current"]["processed"] > 0 and not batches["is_last_batch"]
    if not is_within or epochs["current"]["processed"] < epochs["current"]["started"]:
        return
    if not is_exact:
        rank_zero_warn(
            "ExactResume: the checkpoint was saved without it by a run that had stopped within an epoch; the run goes "
            "on with the next epoch, and is not exact."
        )
        return
    for counts in (epochs["total"], epochs["current"]):
        counts["processed"] -= 1
        counts["completed"] = min(counts["completed"], counts["processed"])


def end_epoch_without_batch(checkpoint: dict[str, Any], ranks: list[dict[str, Any] | None]) -> None:
    """Ends an epoch at whose end a step has fetched in vain, which Lightning takes for a batch in its middle."""
    batches, _, _ = saved_progress(checkpoint)
    current = batches["current"]
    if current["processed"] < current["ready"] and any(each and each.get("finished") for each in ranks):
        current.update(dict.fromkeys(current, current["completed"]))
        batches["is_last_batch"] = True


def complete_last_batch(checkpoint: dict[str, Any]) -> bool:
    """Counts the batch of whose last hook a checkpoint was saved as completed; whether there is one.

    Lightning would go on with the next batch: without the validation and the schedulers' steps that follow a batch,
    and after the last one of an epoch without all that follows the epoch.
    """
    batches, epochs, _ = saved_progress(checkpoint)
    current = batches["current"]
    is_open = current["ready"] == current["processed"] == current["completed"] + 1
    if not is_open or epochs["current"]["processed"] == epochs["current"]["started"]:
        return False
    for counts in (batches["total"], current):
        counts["completed"] += 1
    return True


def repeat_batch(checkpoint: dict[str, Any], ranks: list[dict[str, Any] | None]) -> None:
    """Counts the batch within which a checkpoint was saved as not begun, and what follows the one before as done.

    Lightning keeps it in the total, by which validations across epochs are due, and gives loggers later steps. Before
    the first batch of an epoch it takes that for the end of one after which a validation was due.

    In later epochs it keeps a batch at which `on_train_batch_start` has ended an epoch by -1, or that was not there for
    a `dataloader_iter`, in the total of those begun alone: here it counts as completed.

    Args:
        checkpoint: The checkpoint.
        ranks: The states of ExactResume in it.
    """
    batches, _, _ = saved_progress(checkpoint)
    current, total, completed = batches["current"], batches["total"], batches["current"]["completed"]
    is_unfinished = current["processed"] < current["ready"]
    if is_unfinished:
        for name in current:
            total[name] -= current[name] - completed
            current[name] = completed
        batches["is_last_batch"] = False
    if is_unfinished or completed == current["ready"] == 0:
        for each in filter(None, ranks):
            each["followed"] = True
    earlier = total["ready"] - current["ready"]
    total.update({name: earlier + current[name] for name in current})
