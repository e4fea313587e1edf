# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters whose step needs sums over whole tensors: one all-reduce for all of them."""

import math
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from lightning_optkit._torch_private import foreach_norm
from lightning_optkit.step.coefficients import clip_coefficient
from lightning_optkit.step.compiled import CompiledSegment
from lightning_optkit.step.lockstep import Asking, together
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.reference import Done
from lightning_optkit.step.reference_segment import ReferenceSegment
from lightning_optkit.step.rule import Group
from lightning_optkit.step.segments import Entry
from lightning_optkit.step.shards import local, reduce_sum_, sum_over
from lightning_optkit.step.split_weights import joined
from lightning_optkit.step.statistics import Clipped

__all__ = ["ShardedCompiledSegment", "ShardedReferenceSegment", "ShardedUnitsSegment"]

_BOUND, _RATIO = (GroupNumbers._fields.index(name) for name in ("clip_tensor_norm", "clip_unit_ratio"))


class ShardedReferenceSegment(ReferenceSegment):
    """Shards updated in plain PyTorch, in lockstep: the sums of all parameters share an all-reduce."""

    @override
    def _finish(self, updates: Iterable[Asking[Done]]) -> list[Done]:
        return together(updates, self.process_groups)


class ShardedCompiledSegment(CompiledSegment):
    """Shards walked by a compiled plan, under a clip that scales each tensor.

    Every tensor has a row of numbers of its own, whose bound makes the walk scale the shard as the whole tensor must be
    scaled: the walk divides a bound by the norm of the shard.
    """

    @override
    def _row_of(self, place: int, entry: Entry) -> int:
        return place

    @override
    def norm(self) -> tuple[float, float]:
        self._walk(self._plan.norm)
        # Of every tensor of the plan, so that all processes add up as many numbers: 0 without a gradient.
        sums = self._plan.sums()
        num_nonfinite = sum([each[3] for each in sums])
        here = torch.frombuffer(array("d", [each[0] for each in sums]), dtype=torch.float64)
        self._here = here
        whole = torch.cat([here, *self._more(), torch.tensor([num_nonfinite], dtype=torch.float64, device="cpu")])
        self._whole = reduce_sum_(whole, self.process_groups)[:-1].view(-1, len(here))
        return float(self._whole[0].sum()), float(whole[-1])

    def _more(self) -> list[Tensor]:
        """Other squares of each shard that the processes add up."""
        return []

    @override
    def step(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, statistics: bool
    ) -> Clipped:
        factors = self._factors(numbers[0], grad_scale)  # all groups have one clip
        is_clipped = factors < 1
        bounds = torch.where(is_clipped, factors * (grad_scale * self._here.sqrt() + 1e-6), math.inf)
        walked = self._walk(self._plan.step, self._bounded(groups, numbers, bounds), grad_scale, statistics)
        self._mark_written()
        return self._clipped(factors, is_clipped, Clipped(*walked))

    def _factors(self, stages: GroupNumbers, grad_scale: float) -> Tensor:
        """The factor of the gradient of each whole tensor."""
        return clip_coefficient(stages.clip_tensor_norm, grad_scale * self._whole[0].sqrt())

    def _clipped(self, factors: Tensor, is_clipped: Tensor, walked: Clipped) -> Clipped:
        return Clipped(float(factors.square() @ self._whole[0]), float(is_clipped.sum()))

    def _bounded(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], bounds: Tensor
    ) -> list[tuple[float, ...]]:
        """The numbers of its group for each tensor, with a bound of its own."""
        rows, place = super()._rows(groups, numbers), _BOUND
        ends = [(row[:place], row[place + 1 :]) for row in rows]
        pairs = zip(self._group_of, bounds.tolist(), strict=True)
        return [(*ends[number][0], bound, *ends[number][1]) for number, bound in pairs]

    @cached_property
    def _group_of(self) -> list[int]:
        return [entry.group_index for entry in self.entries]


class ShardedUnitsSegment(ShardedCompiledSegment):
    """The same under a clip that scales units: rows of a matrix, which are in one process, and whole vectors."""

    @override
    def _more(self) -> list[Tensor]:
        param_sq = torch.zeros(len(self.entries), dtype=torch.float64, device="cpu")
        if self._vectors:
            weights = [joined(local(self._params[place].detach()), self._states[place]) for place in self._vectors]
            norms = foreach_norm(weights, 2.0, dtype=torch.float64)
            param_sq[self._is_vector] = torch.stack(norms).square()
        return [param_sq]

    @cached_property
    def _vectors(self) -> list[int]:
        return [place for place, param in enumerate(self._params) if param.ndim < 2]

    @cached_property
    def _is_vector(self) -> Tensor:
        return torch.tensor([param.ndim < 2 for param in self._params], device="cpu")

    @override
    def _factors(self, stages: GroupNumbers, grad_scale: float) -> Tensor:
        grad_sq, param_sq = self._whole
        norms = grad_scale * grad_sq.sqrt()
        allowed = stages.clip_unit_ratio * param_sq.sqrt().clamp(min=stages.clip_unit_eps)
        return torch.where((norms > allowed) & self._is_vector, allowed / norms, 1.0)

    @override
    def _clipped(self, factors: Tensor, is_clipped: Tensor, walked: Clipped) -> Clipped:
        # What the walk counted, except of vectors, of which it saw a part.
        squares, num = factors.square(), float(is_clipped.sum())
        of_rows = walked.grad_sq - float((squares * self._here)[is_clipped].sum()), walked.num - num
        grad_sq, num_rows = sum_over(self.process_groups, of_rows, self._here.device)
        return Clipped(grad_sq + float((squares * self._whole[0])[self._is_vector].sum()), num_rows + num)

    @override
    def _bounded(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], bounds: Tensor
    ) -> list[tuple[float, ...]]:
        rows = super()._bounded(groups, numbers, bounds)
        for place in self._vectors:
            rows[place] = (*rows[place][:_RATIO], math.inf, *rows[place][_RATIO + 1 :])
        return rows
