# SPDX-License-Identifier: Apache-2.0
"""The states of all processes, where one of them writes the checkpoint."""

from typing import Any

import torch

from lightning_optkit.callbacks._own_buffers import those_that_differ

__all__ = ["states_of_ranks"]


def states_of_ranks(mine: dict[str, Any], world_size: int, is_alone: bool) -> list[Any]:
    """The state of each process, in the first one; every process calls it.

    Args:
        mine: The state of this process.
        world_size: Number of processes.
        is_alone: Whether the others may not call it, after an exception: theirs are None then.
    """
    rank, states = torch.distributed.get_rank(), [None] * world_size
    if is_alone:
        return [{**mine, "buffers": {}} if place == rank else None for place in range(world_size)]
    own = {**mine, "buffers": those_that_differ(mine["buffers"])}
    torch.distributed.gather_object(own, states if rank == 0 else None)
    return states
