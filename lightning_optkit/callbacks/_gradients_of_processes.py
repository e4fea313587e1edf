# SPDX-License-Identifier: Apache-2.0
"""The gradients that the processes of a run have saved within an accumulation window, for those that go on.

A process of DDP has a whole gradient of its own batches, and one of FSDP2 a part of the mean of all: rows, in the order
of the processes. A run with another number of processes, or another strategy, goes on with the mean of all.
"""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optkit.step.shards import distribute_like, local, may_differ_in_placement, place_like, reshard

__all__ = ["Gradients", "are_rows", "mean_gradients", "set_gradients"]

Gradients = dict[str, dict[str, Any]]  # by the parameter's name: the part that a process has, the shape of all, `rows`


def are_rows(tensor: Tensor) -> bool:
    """Whether the process has rows of it, and the others the rest in their order, as FSDP2 shards."""
    return isinstance(tensor, DTensor) and not may_differ_in_placement(tensor)


def mean_gradients(processes: Sequence[Gradients | None]) -> Gradients | None:
    """The whole gradients that a step of all processes would use; None if those of a process are missing."""
    names = dict.fromkeys(name for each in processes if each is not None for name in each)
    if any(each is None for each in processes):
        return None
    wholes = {name: _whole([(each or {}).get(name) for each in processes]) for name in names}
    if any(whole is None for whole in wholes.values()):
        _warn()
    return {
        name: {"part": whole, "shape": tuple(whole.shape), "rows": False}
        for name, whole in wholes.items()
        if whole is not None
    }


def set_gradients(pl_module: pl.LightningModule, mine: Gradients | None, processes: Sequence[Gradients | None]) -> None:
    """Gives the parameters the gradients that this process has saved, or its part of the mean of all.

    Args:
        pl_module: The module.
        mine: What this process has saved; None if it is lost.
        processes: The same of all processes.
    """
    reshard(pl_module)
    known = [each for each in processes if each is not None]
    is_lost = mine is None
    for name, param in () if mine is None else pl_module.named_parameters():
        own, entries = (mine or {}).get(name), [each.get(name) for each in known]
        saved = next((each for each in (own, *entries) if each is not None), None)
        if saved is None:
            continue
        is_placed_alike = _has_rows(saved) == are_rows(param)
        if is_placed_alike and (own is None or own["part"].shape == local(param).shape):
            param.grad = None if own is None else place_like(own["part"].to(local(param), copy=True), param)
            continue
        whole = _whole(entries) if len(known) == len(processes) else None
        if whole is not None:
            param.grad = distribute_like(whole.to(local(param)), param)
        is_lost |= whole is None
    if is_lost:
        _warn()


def _whole(entries: Sequence[dict[str, Any] | None]) -> Tensor | None:
    """The mean gradient of a parameter; None if the parts are none that can be put together.

    A process without one adds nothing to the mean, as in DDP.
    """
    known = [each for each in entries if each is not None]
    shape = tuple(known[0]["shape"])
    if any(_has_rows(each) for each in known):
        whole = torch.cat([each["part"] for each in known]) if len(known) == len(entries) else None
    elif all(tuple(each["part"].shape) == shape for each in known):
        whole = torch.stack([each["part"] for each in known]).sum(0) / len(entries)
    else:
        whole = None
    return whole if whole is not None and tuple(whole.shape) == shape else None


def _has_rows(saved: dict[str, Any]) -> bool:
    """Of checkpoints of older versions by the shape."""
    return bool(saved.get("rows", tuple(saved["part"].shape) != tuple(saved["shape"])))


def _warn() -> None:
    rank_zero_warn(
        "ExactResume: the first step misses the gradients of its batches from before the checkpoint; resume from one "
        "that was saved after a step to have it whole."
    )
