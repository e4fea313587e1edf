# SPDX-License-Identifier: Apache-2.0
"""Whole tensors of their shards, and back: many shards travel in one collective."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lightning_optkit.step.shards import distribute_like, local, place_like, sharding_groups

__all__ = ["gathered", "in_buckets", "scatter_"]

T = TypeVar("T")

_BUCKET = 2**24  # elements that are whole at a time
_ALIGNED = 16  # bytes


def in_buckets(items: Sequence[T], sizes: Sequence[int]) -> Iterator[Sequence[T]]:
    """Runs of `items`, of about as many elements together as shall be whole at a time."""
    begin = total = 0
    for place, size in enumerate(sizes):
        if total and total + size > _BUCKET:
            yield items[begin:place]
            begin, total = place, 0
        total += size
    if begin < len(items):
        yield items[begin:]


def gathered(shards: Sequence[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
    """The whole tensors, contiguous, of local shards that are placed like `likes`; copies, the same in every process.

    Every process must call this with shards of the same tensors. Those sharded in one dimension over the same processes
    travel together.
    """
    whole: list[Tensor | None] = [None] * len(shards)
    alike: dict[Any, list[int]] = {}
    for place, like in enumerate(likes):
        key = None if _sharded_dim(like) is None else sharding_groups(like)
        alike.setdefault(key, []).append(place)
    for key, places in alike.items():
        if key is None:
            for place in places:
                whole[place] = _gathered_alone(shards[place], likes[place])
            continue
        together = _gathered_together([shards[place] for place in places], [likes[place] for place in places], key[0])
        for place, each in zip(places, together, strict=True):
            whole[place] = each
    return [each for each in whole if each is not None]


@torch.no_grad()
def scatter_(shard: Tensor, whole: Tensor, like: Tensor) -> None:
    """Writes this process's part of `whole` into `shard`, the local part of a tensor placed like `like`."""
    dim = _sharded_dim(like)
    if dim is None:
        shard.copy_(local(distribute_like(whole, like)))
        return
    (group,) = sharding_groups(like)
    size = like.shape[dim]
    begin = min(_chunk(size, group) * torch.distributed.get_rank(group), size)
    shard.copy_(whole.narrow(dim, begin, shard.shape[dim]))


def _sharded_dim(like: Tensor) -> int | None:
    """The dimension in which a tensor is sharded, if it is one and over one group of processes."""
    if not isinstance(like, DTensor) or len(sharding_groups(like)) != 1:
        return None
    split = [place for i, place in enumerate(like.placements) if like.device_mesh.size(i) > 1 and place.is_shard()]
    return split[0].dim if len(split) == 1 and type(split[0]) is Shard else None


def _chunk(size: int, group: Any) -> int:
    return -(-size // torch.distributed.get_world_size(group))


def _gathered_alone(shard: Tensor, like: Tensor) -> Tensor:
    # No collective takes int16, the low-order parts of split weights.
    placed = place_like(shard.to(torch.int32) if shard.dtype == torch.int16 else shard, like)
    whole = placed.full_tensor() if isinstance(placed, DTensor) else placed
    return shard.new_empty(like.shape).copy_(whole)


def _gathered_together(shards: Sequence[Tensor], likes: Sequence[Tensor], group: Any) -> list[Tensor]:
    dims = [_sharded_dim(like) for like in likes]
    padded = [
        _padded(shard, dim, _chunk(like.shape[dim], group))
        for shard, like, dim in zip(shards, likes, dims, strict=True)
        if dim is not None
    ]
    flat = [each.reshape(-1).view(torch.uint8) for each in padded]
    starts, end = [], 0
    for each in flat:
        starts.append(end)
        end += -(-len(each) // _ALIGNED) * _ALIGNED
    sent = torch.zeros(end, dtype=torch.uint8, device=shards[0].device)
    for start, each in zip(starts, flat, strict=True):
        sent[start : start + len(each)] = each
    num = torch.distributed.get_world_size(group)
    rows = sent.new_empty(num, end)
    torch.distributed.all_gather([*rows.unbind()], sent, group=group)
    whole: list[Tensor] = []
    for start, each, block, like, dim in zip(starts, flat, padded, likes, dims, strict=True):
        assert dim is not None
        parts = rows[:, start : start + len(each)].contiguous().view(-1).view(block.dtype)
        merged = parts.view(num * block.shape[0], *block.shape[1:])[: like.shape[dim]]
        whole.append(shards[0].new_empty(like.shape, dtype=block.dtype))
        whole[-1].movedim(dim, 0).copy_(merged)
    return whole


def _padded(shard: Tensor, dim: int, chunk: int) -> Tensor:
    """The shard with the sharded dimension first, filled with zeros up to the size that the largest shard has."""
    moved = shard.detach().movedim(dim, 0)
    if len(moved) == chunk:
        return moved.contiguous()
    filled = moved.new_zeros(chunk, *moved.shape[1:])
    filled[: len(moved)] = moved
    return filled
