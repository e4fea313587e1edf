# SPDX-License-Identifier: Apache-2.0
"""Sorts the parameters of an optimizer into segments, and knows when that has to be done again."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_optkit.step.compiled import CompiledSegment
from lightning_optkit.step.cuda import CudaSegment
from lightning_optkit.step.numbers import GroupNumbers, average_weight
from lightning_optkit.step.rule import Group, Rule
from lightning_optkit.step.segments import Entry, ReferenceSegment
from lightning_optkit.step.shards import local, sharding_groups, why_not_on_shards
from lightning_optkit.step.snapshot import take_snapshot
from lightning_optkit.step.state import StateLayout, check_state_shapes, prepare_state

if TYPE_CHECKING:
    from lightning_optkit.step.optimizer import OnePassOptimizer

__all__ = ["Segment", "StepPlan"]

Segment = CompiledSegment | ReferenceSegment


class StepPlan:
    """The segments of an optimizer: every parameter that has, or once had, a gradient.

    Args:
        optimizer: Its missing state is created.
    """

    def __init__(self, optimizer: "OnePassOptimizer") -> None:
        self._optimizer = optimizer
        layout = StateLayout(optimizer.average, optimizer.state_dtype)
        entries: list[tuple[Entry, Group, Rule]] = []
        self._dormant: list[Tensor] = []
        for group_index, group in enumerate(optimizer.param_groups):
            rule, held = optimizer._rule(group), optimizer._held(group)
            for param in group["params"]:
                if param.grad is None and not optimizer.state.get(param):
                    self._dormant.append(param)
                else:
                    number = len(entries) + len(self._dormant)
                    state = optimizer.state.get(param, {})
                    entry = Entry(param, state, rule.held_by(param, held), group_index, number)
                    entries.append((entry, group, rule))
        for entry, group, rule in entries:
            reason = why_not_on_shards(entry.param, group, rule, optimizer.clip, optimizer.state_dtype)
            if reason is not None:
                raise ValueError(
                    f"{type(optimizer).__name__}.step: cannot {reason} of a parameter that is sharded over processes; "
                    "use DDP for it, or a rule, a clip and state that need no whole tensor."
                )
        check_state_shapes(type(optimizer).__name__, entries, layout)
        for entry, _, _ in entries:
            optimizer.state[entry.param] = entry.state
        prepare_state(entries, layout)
        self._average_name = layout.average_name
        # All averages keep one clock: that of the parameter that was updated most often.
        steps = [entry.state["step"] for entry, _, _ in entries] if layout.average_name else []
        self.clock = int(torch.stack(steps).max()) if steps else 0
        self.segments = self._segmented(entries, layout.average_name)
        self._state = optimizer.state
        self._signature = self._signature_now()
        self._snapshot = take_snapshot(optimizer.state, [group["params"] for group in optimizer.param_groups])

    def is_outdated(self) -> bool:
        """Has anything changed that the plan relies on: parameters, state tensors, what a group keeps?"""
        if self._state is not self._optimizer.state or not self._snapshot.unchanged():
            return True
        return self._signature != self._signature_now() or any(p.grad is not None for p in self._dormant)

    def _signature_now(self) -> list[tuple[object, ...]]:
        return [
            (self._optimizer._rule(g).name, self._optimizer._held(g), g["rounding"], g["fused"] is False)
            for g in self._optimizer.param_groups
        ]

    def bind(self) -> list[Segment]:
        """The segments that have gradients, pointed at them."""
        return [segment for segment in self.segments if segment.bind()]

    @torch.no_grad()
    def average_idle(self, numbers: Sequence[GroupNumbers]) -> None:
        """Moves the averages of parameters that had no gradient in this step, so that all averages keep one clock."""
        name = self._average_name
        idle = [entry for segment in self.segments for entry in segment.idle()] if name else []
        if name is None or not idle:
            return
        for entry in idle:
            group, average, so_far = numbers[entry.group_index], local(entry.state[name]), entry.state["num_averaged"]
            if average_weight(group, 1.0) == 0:
                continue
            # On CUDA only the device knows how often an average was updated, and nobody waits for it.
            seen = so_far.to(average.dtype)
            usual = torch.full_like(seen, 1.0 - group.average_decay) if group.average_kind == 1 else 1.0 / (seen + 1.0)
            weight = torch.where(seen > 0, usual, 0.0)
            average += weight * (local(entry.param.detach()).to(average.dtype) - average)
            so_far += seen > 0

    def _segmented(self, entries: Iterable[tuple[Entry, Group, Rule]], average_name: str | None) -> list[Segment]:
        owner = type(self._optimizer).__name__
        compiled: dict[tuple[object, ...], tuple[Rule, list[Entry]]] = {}
        reference: dict[tuple[object, ...], tuple[Rule, list[Entry]]] = {}
        for entry, group, rule in entries:
            # A sum over a segment is a sum over the same processes.
            key = (rule.name, entry.param.dtype == torch.float64, sharding_groups(entry.param))
            alike = reference if self._optimizer._why_reference(entry.param, group) else compiled
            alike.setdefault(key, (rule, []))[1].append(entry)
        segments: list[Segment] = [
            (CudaSegment if members[0].param.is_cuda else CompiledSegment)(rule, members, average_name, owner)
            for rule, members in compiled.values()
        ]
        segments += [ReferenceSegment(rule, members, average_name, owner) for rule, members in reference.values()]
        return segments
