# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of before the first batch: the random state that a whole run follows from."""

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

__all__ = ["is_of_beginning", "state_to_begin_from"]


def is_of_beginning(state: dict[str, Any] | None) -> bool:
    """Whether a state of ExactResume was saved before the first batch."""
    return state is not None and any(each is not None and "begin" in each for each in state.get("ranks", ()))


def state_to_begin_from(ranks: list[Any], rank: int, processes: int, now: dict[str, Any]) -> dict[str, Any]:
    """The random state of a process; that of now, with a warning, if it is not in the checkpoint.

    Args:
        ranks: The saved states of the processes.
        rank: This process.
        processes: How many there are now.
        now: Its random state. Its loaders were not made when a checkpoint was saved in `on_fit_start`.
    """
    mine = ranks[rank] if len(ranks) == processes else None
    if mine is None or len(mine["begin"]["seeds"]) < len(now["seeds"]):
        rank_zero_warn(
            "ExactResume: the checkpoint was saved before the first batch, by other processes or without the seeds of "
            "their samplers; the run begins with other random numbers, and is not exact."
        )
        return now
    before = mine["begin"]
    return {**before, "loaders": before["loaders"] if len(before["loaders"]) == len(now["loaders"]) else now["loaders"]}
