# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters (FSDP2: `torch.distributed.tensor.DTensor`). Every walk is over the local shard."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Replicate

from lightning_optkit._native import extension
from lightning_optkit._torch_private import local_shard
from lightning_optkit.step.rule import Clip, Group, Rule
from lightning_optkit.step.statistics import TensorStatistics

if extension is not None:
    extension.set_sharded_type(DTensor)

__all__ = [
    "distribute_like",
    "local",
    "place_like",
    "reduce_sum_",
    "reshard",
    "sharding_groups",
    "whole_statistics",
    "why_not_on_shards",
]


def local(t: Tensor) -> Tensor:
    """The local shard of a tensor, sharing its memory; an unsharded tensor unchanged."""
    return local_shard(t) if isinstance(t, DTensor) else t


def sharding_groups(t: Tensor) -> tuple[Any, ...]:
    """The process groups over which sums of local shards must be reduced; empty for a tensor that is not sharded."""
    if not isinstance(t, DTensor):
        return ()
    mesh = t.device_mesh
    return tuple(mesh.get_group(i) for i, placement in enumerate(t.placements) if not isinstance(placement, Replicate))


def place_like(part: Tensor, like: Tensor) -> Tensor:
    """`part` as the local shard of a tensor placed like `like`, sharing its memory."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, sharded or not, with the placement of `like`."""
    if not isinstance(like, DTensor):
        return value.full_tensor() if isinstance(value, DTensor) else value
    if isinstance(value, DTensor):
        return value.redistribute(placements=like.placements)
    # Every process holds the whole value, so no communication is needed.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reshard(module: nn.Module) -> None:
    """Reshards a module before its parameters are used outside a forward pass.

    After a forward pass, FSDP2 leaves the root's parameters unsharded for the backward pass. An evaluation has no
    backward pass, so the module's parameters would not be those of the optimizer, and the next forward pass would
    ignore writes to the latter.
    """
    for child in module.modules():
        if hasattr(child, "set_reshard_after_forward"):  # an FSDPModule
            cast(Any, child).reshard()


def reduce_sum_(sums: Tensor, groups: Sequence[Any]) -> Tensor:
    """Sums `sums` over the processes of each group, in place."""
    for group in groups:
        torch.distributed.all_reduce(sums, group=group)
    return sums


def whole_statistics(params: Sequence[Tensor], counted: Mapping[int, TensorStatistics]) -> dict[int, TensorStatistics]:
    """Statistics by parameter number, those of shards summed over the processes, all of which must call this."""
    result = {number: each for number, each in counted.items() if not sharding_groups(params[number])}
    numbers: dict[tuple[Any, ...], list[int]] = {}
    for number, param in enumerate(params):
        if groups := sharding_groups(param):
            numbers.setdefault(groups, []).append(number)
    width = len(fields(TensorStatistics))
    for groups, members in numbers.items():
        # A process whose shard is empty, or had no gradient, adds nothing; the last column counts the others.
        rows = [(*astuple(counted[n]), 1.0) if n in counted else (0.0,) * (width + 1) for n in members]
        sums = torch.tensor(rows, dtype=torch.float64, device=local(params[members[0]]).device)
        for number, row in zip(members, reduce_sum_(sums, groups).tolist(), strict=True):
            if row[-1]:
                result[number] = TensorStatistics(*row[:width])
    return result


def why_not_on_shards(param: Tensor, group: Group, rule: Rule, clip: Clip | None, state_dtype: object) -> str | None:
    """Why a step of this group cannot run on local shards alone, or None."""
    if not sharding_groups(param):
        return None
    if state_dtype == "int8":
        return "keep 8-bit state"
    if rule.needs_whole:
        return rule.needs_whole
    if rule.trust_ratio is not None:
        return "set the rate by the norm"
    if clip is not None and math.isfinite(clip.bounds.max_tensor_norm):
        return "clip the norm of one tensor"
    if clip is not None and math.isfinite(clip.bounds.unit_ratio):
        return "clip units"
    if group["caution"]:
        return "count the signs"
    return "centralize" if group["centralize"] else None
