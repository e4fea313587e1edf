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
from torch.distributed.tensor.placement_types import Replicate, Shard

from lightning_optkit._native import extension
from lightning_optkit._torch_private import local_shard
from lightning_optkit.step.clip import Clip
from lightning_optkit.step.rule import Group, Rule
from lightning_optkit.step.statistics import TensorStatistics

if extension is not None:
    extension.set_sharded_type(DTensor)

# Numbers that a process may receive for a sum: of so few not the bytes but gloo's latency is the cost.
_FEW = 1 << 16

__all__ = [
    "counts_here",
    "distribute_like",
    "has_whole_rows",
    "local",
    "may_differ_in_placement",
    "place_like",
    "placed_like",
    "reduce_sum_",
    "reshard",
    "reshard_after_failure",
    "sharding_groups",
    "sum_over",
    "unsharded",
    "whole_statistics",
    "why_gathered",
]


def local(t: Tensor) -> Tensor:
    """The local shard of a tensor, sharing its memory; an unsharded tensor unchanged."""
    return local_shard(t) if isinstance(t, DTensor) else t


def sharding_groups(t: Tensor) -> tuple[Any, ...]:
    """The process groups over which sums of local shards must be reduced; empty for a tensor that is not sharded."""
    if not isinstance(t, DTensor):
        return ()
    mesh = t.device_mesh
    return tuple(
        mesh.get_group(i)
        for i, placement in enumerate(t.placements)
        if mesh.size(i) > 1 and not isinstance(placement, Replicate)
    )


def has_whole_rows(t: Tensor) -> bool:
    """Whether each row of the first dimension is in one process, as FSDP2 shards by default."""
    mesh = t.device_mesh if isinstance(t, DTensor) else None
    placements = t.placements if isinstance(t, DTensor) else ()
    split = [place for i, place in enumerate(placements) if mesh is not None and mesh.size(i) > 1]
    return all(isinstance(place, Replicate) or getattr(place, "dim", None) == 0 for place in split)


def may_differ_in_placement(param: Tensor) -> bool:
    """Whether its gradient may be placed otherwise; FSDP2 alone places both alike."""
    return isinstance(param, DTensor) and (param.device_mesh.ndim > 1 or param.placements != (Shard(0),))


def placed_like(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient with the placement of its parameter.

    With sequence parallelism, the gradient of a parameter that is replicated is a partial sum in each process.
    """
    if not isinstance(param, DTensor) or not isinstance(grad, DTensor) or grad.placements == param.placements:
        return grad
    return grad.redistribute(placements=param.placements)


def counts_here(t: Tensor) -> bool:
    """Whether what this process counts of the whole tensor enters a sum over `sharding_groups`: one of them counts."""
    return all(torch.distributed.get_rank(group) == 0 for group in sharding_groups(t))


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


def unsharded(t: Tensor) -> Tensor:
    """The whole tensor; a sharded one is gathered, so every process must call this."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def reshard(module: nn.Module) -> None:
    """Reshards a module before its parameters are used outside a forward pass.

    After a forward pass, FSDP2 leaves the root's parameters unsharded for the backward pass. An evaluation has no
    backward pass, so the module's parameters would not be those of the optimizer, and the next forward pass would
    ignore writes to the latter.
    """
    for child in module.modules():
        if hasattr(child, "set_reshard_after_forward"):  # an FSDPModule
            cast(Any, child).reshard()


def reshard_after_failure(module: nn.Module) -> None:
    """The same for a module whose forward pass an exception has ended, in which FSDP2 keeps the root unsharded.

    Until it is set otherwise, the root is then resharded after each forward pass, which takes one more all-gather.
    """
    for child in module.modules():
        if hasattr(child, "set_reshard_after_forward"):
            cast(Any, child).set_reshard_after_forward(True, recurse=False)
            cast(Any, child).reshard()


def reduce_sum_(sums: Tensor, groups: Sequence[Any]) -> Tensor:
    """Sums `sums` over the processes of each group, in place, to the same bits in all of them."""
    for group in groups:
        received = sums.numel() * torch.distributed.get_world_size(group)
        if sums.device.type == "cpu" and sums.numel() > 2 and received <= _FEW:
            _gather_sum_(sums, group)
        else:
            torch.distributed.all_reduce(sums, group=group)
    return sums


def _gather_sum_(sums: Tensor, group: Any) -> None:
    """The same by one exchange of messages, where gloo's all-reduce takes several, one after the other."""
    parts = [torch.empty_like(sums) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, sums, group=group)
    sums.copy_(parts[0])
    for part in parts[1:]:  # in one order everywhere
        sums.add_(part)


def sum_over(groups: Sequence[Any], sums: tuple[float, float], device: torch.device) -> tuple[float, float]:
    """`sums`, of one process, summed over the processes of each group."""
    if not groups:
        return sums
    first, second = reduce_sum_(torch.tensor(sums, dtype=torch.float64, device=device), groups).tolist()
    return first, second


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


def why_gathered(
    param: Tensor, group: Group, rule: Rule, clip: Clip | None, state_dtype: torch.dtype | str
) -> str | None:
    """Why a step needs all of a sharded parameter in every process, or None if sums over the processes are enough."""
    if not sharding_groups(param):
        return None
    if rule.needs_whole:
        return rule.needs_whole
    if state_dtype == "int8" and rule.kept_names(group):
        return "scale blocks of 128 numbers"
    if group["caution"]:
        return "count the signs"
    if param.ndim < 2 or has_whole_rows(param):
        return None
    if clip is not None and math.isfinite(clip.bounds.unit_ratio):
        return "clip its rows"
    return "center its rows" if group["centralize"] else None
