# SPDX-License-Identifier: Apache-2.0
"""Combines the statistics of a transform over the processes of a distributed run."""

import copy
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from lightning_optkit._checks import check_instance, check_like

__all__ = ["Mergeable", "merge_across_ranks"]


class Mergeable(Protocol):
    """A transform that can be merged with another of its class and sent to another process."""

    def merge(self, other: Any) -> Any:
        """Merges the statistics of `other`."""

    def state_dict(self) -> Any:
        """The statistics."""

    def load_state_dict(self, state_dict: Any) -> object:
        """Restores the result of `state_dict`."""


_Transform = TypeVar("_Transform", bound=Mergeable)


def merge_across_ranks(transform: _Transform, *, group: dist.ProcessGroup | None = None) -> _Transform:
    """Merges the statistics of `transform` over all ranks; call it between `partial_fit` and `finalize`.

    States are gathered and merged in rank order, so all ranks get bitwise equal results. No-op without an initialized
    process group. A sampler that repeats rows to fill the last batch counts them twice: fit on a loader without
    padding.

    Args:
        transform: The transform of this rank, not finalized; changed in place.
        group: The processes to combine. Default: all.

    Returns:
        `transform`.

    Raises:
        TypeError: if `transform` has no `merge`, `state_dict` and `load_state_dict`, or `group` is no process group.

    Cost: one `all_gather_object` of the state.

    Example:
        >>> import torch
        >>> from lightning_optkit.data import Standardize
        >>> scale = Standardize().partial_fit(torch.tensor([[1.0], [3.0]]))
        >>> merge_across_ranks(scale).finalize().mean
        tensor([2.], dtype=torch.float64)
    """
    names = ("merge", "state_dict", "load_state_dict")
    check_like("merge_across_ranks", "transform", transform, names, "a transform such as Standardize()")
    if group is not None:
        check_instance("merge_across_ranks", "group", group, dist.ProcessGroup, "None or a process group")
    if not (dist.is_available() and dist.is_initialized()):
        return transform
    states: list[dict[str, Any]] = [{}] * dist.get_world_size(group)
    mine = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in transform.state_dict().items()}
    dist.all_gather_object(states, mine, group=group)
    transform.load_state_dict(states[0])
    for state in states[1:]:
        other = copy.deepcopy(transform)
        other.load_state_dict(state)
        transform.merge(other)
    return transform
