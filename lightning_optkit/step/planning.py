# SPDX-License-Identifier: Apache-2.0
"""Sorts the parameters of an optimizer into segments, and knows when that has to be done again."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_optkit.step.compiled import CompiledSegment
from lightning_optkit.step.cuda import CudaSegment
from lightning_optkit.step.rule import Group, Rule
from lightning_optkit.step.segments import Entry, ReferenceSegment
from lightning_optkit.step.state import StateLayout, create_missing_state

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
        entries: list[tuple[Entry, Group]] = []
        self._dormant: list[Tensor] = []
        for group_index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if param.grad is None and not optimizer.state.get(param):
                    self._dormant.append(param)
                else:
                    number = len(entries) + len(self._dormant)
                    entries.append((Entry(param, optimizer.state[param], group_index, number), group))
        create_missing_state([(entry, group, optimizer._held(group)) for entry, group in entries], layout)
        self.segments = self._segmented(entries, layout.average_name)
        self._state = optimizer.state
        self._sample = [(entry.param, entry.state) for entry, _ in (entries[:1] + entries[-1:])]

    def is_outdated(self) -> bool:
        """Has a parameter got its first gradient, or has the state been replaced?"""
        if self._state is not self._optimizer.state:
            return True
        if any(p.grad is not None for p in self._dormant):
            return True
        # What replaces state does so in bulk (a move to another device and back): two entries tell.
        return any(self._state.get(p) is not state for p, state in self._sample)

    def bind(self) -> list[Segment]:
        """The segments that have gradients, pointed at them."""
        return [segment for segment in self.segments if segment.bind()]

    def _segmented(self, entries: Iterable[tuple[Entry, Group]], average_name: str | None) -> list[Segment]:
        owner = type(self._optimizer).__name__
        compiled: dict[tuple[str, bool], tuple[Rule, list[Entry]]] = {}
        reference: dict[str, tuple[Rule, list[Entry]]] = {}
        for entry, group in entries:
            rule = self._optimizer._rule(group)
            if self._optimizer._why_reference(entry.param, group) is None:
                key = (rule.name, entry.param.dtype == torch.float64)
                compiled.setdefault(key, (rule, []))[1].append(entry)
            else:
                reference.setdefault(rule.name, (rule, []))[1].append(entry)
        segments: list[Segment] = [
            (CudaSegment if members[0].param.is_cuda else CompiledSegment)(rule, members, average_name, owner)
            for rule, members in compiled.values()
        ]
        segments += [ReferenceSegment(rule, members, average_name) for rule, members in reference.values()]
        return segments
