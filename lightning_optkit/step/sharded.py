# SPDX-License-Identifier: Apache-2.0
"""Sharded parameters whose step needs sums over whole tensors: one all-reduce for all of them."""

import math
from collections.abc import Iterable, Sequence

import torch
from typing_extensions import override

from lightning_optkit.step.coefficients import clip_coefficient
from lightning_optkit.step.compiled import CompiledSegment
from lightning_optkit.step.lockstep import Asking, together
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.reference import Done
from lightning_optkit.step.rule import Group
from lightning_optkit.step.segments import Entry, ReferenceSegment
from lightning_optkit.step.shards import local, reduce_sum_, sum_over
from lightning_optkit.step.split_weights import joined
from lightning_optkit.step.statistics import Clipped

__all__ = ["ShardedCompiledSegment", "ShardedReferenceSegment"]


class ShardedReferenceSegment(ReferenceSegment):
    """Shards updated in plain PyTorch, in lockstep: the sums of all parameters share an all-reduce."""

    @override
    def _finish(self, updates: Iterable[Asking[Done]]) -> list[Done]:
        return together(updates, self.process_groups)


class ShardedCompiledSegment(CompiledSegment):
    """Shards walked by a compiled plan, under a clip that scales tensors or units separately.

    A row of the first dimension, which is a unit of a matrix, is in one process. Every tensor has a row of numbers of
    its own, whose bound makes the walk scale the shard as the whole tensor must be scaled.
    """

    @override
    def _row_of(self, place: int, entry: Entry) -> int:
        return place

    @override
    def norm(self) -> tuple[float, float]:
        self._walk(self._plan.norm)
        self._here = self._plan.sums()
        measured = [(0.0, 0.0, 0.0)] * len(self.entries)
        for place in self._active.places:
            measured[place] = self._here[place][0], self._here[place][3], self._param_sq(place)
        sums = torch.tensor(measured, dtype=torch.float64, device="cpu")
        self._whole: list[list[float]] = reduce_sum_(sums, self.process_groups).tolist()
        return sum(row[0] for row in self._whole), sum(row[1] for row in self._whole)

    def _param_sq(self, place: int) -> float:
        """Of a vector, which is one unit."""
        param = self._params[place]
        if param.ndim > 1:
            return 0.0
        return float(joined(local(param.detach()), self._states[place]).double().square().sum())

    @override
    def step(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, statistics: bool
    ) -> Clipped:
        rules = [tuple(self.rule.hyperparameters(group).values()) for group in groups]
        rows, here, whole, num = [], 0.0, 0.0, 0
        has_units = False
        for place, entry in enumerate(self.entries):
            stages = numbers[entry.group_index]
            coefficient = self._coefficient(place, stages, grad_scale)
            if coefficient is None:
                has_units = True
            else:
                part = self._here[place][0]
                # The walk divides this bound by the norm of the shard, and the quotient is the coefficient.
                bound = coefficient * (grad_scale * math.sqrt(part) + 1e-6) if coefficient < 1 else math.inf
                stages = stages._replace(clip_tensor_norm=bound, clip_unit_ratio=math.inf)
                whole, num = whole + coefficient**2 * self._whole[place][0], num + (coefficient < 1)
                here += coefficient**2 * part if coefficient < 1 else 0.0
            rows.append((*stages, *rules[entry.group_index]))
        grad_sq, clipped = self._walk(self._plan.step, rows, grad_scale, statistics)
        self._mark_written()
        if has_units:  # all that the walk counted, except of tensors
            grad_sq, clipped = sum_over(self.process_groups, (grad_sq - here, clipped - num), torch.device("cpu"))
            return Clipped(whole + grad_sq, num + clipped)
        return Clipped(whole, num)

    def _coefficient(self, place: int, stages: GroupNumbers, grad_scale: float) -> float | None:
        """The factor of the whole tensor's gradient; None if its rows have factors of their own."""
        grad_sq, _, param_sq = self._whole[place]
        norm = grad_scale * math.sqrt(grad_sq)
        if math.isfinite(stages.clip_tensor_norm):
            return clip_coefficient(stages.clip_tensor_norm, norm)
        if self._params[place].ndim > 1:
            return None
        bound = stages.clip_unit_ratio * max(math.sqrt(param_sq), stages.clip_unit_eps)
        return bound / norm if norm > bound else 1.0
