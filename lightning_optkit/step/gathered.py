# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters whose step needs whole tensors: every process gathers a few at a time, and keeps its shard."""

import math
from collections.abc import Sequence
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_optkit.step.gathering import gathered, in_buckets, scatter_
from lightning_optkit.step.gradient_reference import dense
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.reference_segment import ReferenceSegment
from lightning_optkit.step.rule import Group, State
from lightning_optkit.step.segments import Bound, Entry, Segment
from lightning_optkit.step.shards import counts_here, local
from lightning_optkit.step.statistics import Clipped, TensorStatistics

__all__ = ["GatheredSegment", "gathering"]


class _Shard(NamedTuple):
    """A sharded tensor that a step writes, and the whole copy that it is written from."""

    held: Tensor
    like: Tensor
    whole: Tensor


class GatheredSegment(ReferenceSegment):
    """Parameters that are whole in every process while they are updated, a few at a time, by another class of segment.

    Parameter, gradient and state are gathered; all processes compute the same, and each keeps its own shard. State of
    another shape than the parameter, such as sums by row, is whole in every process.
    """

    inner: ClassVar[type[Segment]]

    @override
    def step(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, statistics: bool
    ) -> Clipped:
        self.check()
        clipped, self._statistics = Clipped(0.0, 0.0), dict[int, TensorStatistics]()
        self._observed = torch.zeros(2, dtype=torch.float64)
        sizes = [bound.entry.param.numel() for bound in self._bound]
        for bounds in in_buckets(self._bound, sizes):
            segment, shards = self._whole(bounds)
            if any(math.isfinite(each.clip_tensor_norm) for each in numbers):
                segment.norm()
            part = segment.step(groups, numbers, grad_scale, statistics)
            clipped = Clipped(clipped.grad_sq + part.grad_sq, clipped.num + part.num)
            if self.rule.estimate is not None:
                self._observed += segment.observed().cpu()
            if statistics and counts_here(bounds[0].entry.param):
                self._statistics |= segment.statistics()
            for held, like, whole in shards:
                scatter_(local(held.detach()), whole, like)
        return clipped

    def _whole(self, bounds: Sequence[Bound]) -> tuple[Segment, list[_Shard]]:
        """A segment bound to whole copies of these parameters, and what must be written back."""
        held: list[tuple[Tensor, Tensor]] = []
        for entry, state, _ in bounds:
            sharded = [t for t in state.values() if isinstance(t, DTensor)]
            held += [(t, entry.param) for t in (entry.param, *sharded)]
        read = [(dense(grad), entry.param) for entry, _, grad in bounds]
        whole = gathered([local(t) for t, _ in (*held, *read)], [like for _, like in (*held, *read)])
        grads = whole[len(held) :]
        shards = [_Shard(t, like, each) for (t, like), each in zip(held, whole[: len(held)], strict=True)]
        copies = iter(whole)
        entries, states = [], list[State]()
        for (entry, state, _), grad in zip(bounds, grads, strict=True):
            param = nn.Parameter(next(copies), requires_grad=True)
            param.grad = grad
            entries.append(Entry(param, entry.state_names, entry.group_index, entry.tensor_index))
            states.append({name: next(copies) if isinstance(t, DTensor) else t for name, t in state.items()})
        segment = self.inner(self.rule, entries, states, self._average_name, self._owner)
        segment.bind(states)
        return segment, shards

    @override
    def statistics(self) -> dict[int, TensorStatistics]:
        return self._statistics

    @override
    def observed(self) -> Tensor:
        # Every process observed all of it; one counts.
        return self._observed if counts_here(self.entries[0].param) else torch.zeros_like(self._observed)


@cache
def gathering(inner: type[Segment]) -> type[GatheredSegment]:
    """The class that gathers parameters for segments of class `inner`."""
    return type(f"Gathered{inner.__name__}", (GatheredSegment,), {"inner": inner})
