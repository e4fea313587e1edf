# SPDX-License-Identifier: Apache-2.0
"""Parameters that are stepped in plain PyTorch."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_optkit.step.gradient_reference import norm_reference
from lightning_optkit.step.lockstep import Asking, alone
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.reference import Done, step_reference_
from lightning_optkit.step.rule import Group, Rule, State
from lightning_optkit.step.segments import Bound, Entry, PlanOutdated, Segment, check_gradient
from lightning_optkit.step.shards import local, placed_like, sharding_groups, sum_over
from lightning_optkit.step.statistics import Clipped, TensorStatistics

__all__ = ["ReferenceSegment"]


class ReferenceSegment(Segment):
    """Parameters updated one by one in plain PyTorch.

    Args:
        rule: The update rule.
        entries: The parameters.
        states: The state of each parameter; only its form is remembered.
        average_name: Name of the average in the state, if there is one.
        owner: Name in error messages.
    """

    def __init__(
        self, rule: Rule, entries: Sequence[Entry], states: Sequence[State], average_name: str | None, owner: str
    ) -> None:
        self.rule, self.entries, self._average_name, self._owner = rule, list(entries), average_name, owner
        self.process_groups = sharding_groups(self.entries[0].param)
        pairs = zip(self.entries, states, strict=True)
        self._forms = {entry.tensor_index: self._form(entry, state) for entry, state in pairs}
        self._bound: list[Bound] = []
        self._idle: list[tuple[Entry, State]] = []
        self._done: dict[int, Done] = {}

    @override
    def bind(self, states: Sequence[State]) -> bool:
        self.release()
        for entry, state in zip(self.entries, states, strict=True):
            grad = entry.param.grad
            if grad is None:
                self._idle.append((entry, state))
            else:
                self._bound.append(Bound(entry, state, local(placed_like(grad, entry.param))))
        self.check()
        return bool(self._bound)

    @override
    def release(self) -> None:
        self._bound, self._idle = [], []

    @override
    def check(self) -> None:
        for entry, state, grad in self._bound:
            if self._form(entry, state) != self._forms[entry.tensor_index]:
                raise PlanOutdated
            check_gradient(self._owner, local(entry.param), grad)

    @override
    def idle(self) -> list[tuple[Entry, State]]:
        return self._idle

    def _form(self, entry: Entry, state: State) -> list[tuple[object, ...]]:
        """Shape, dtype and device of every tensor that a step of this entry touches."""
        tensors = [("", local(entry.param))]
        tensors += [(name, local(t)) for name, t in state.items() if isinstance(t, Tensor)]
        return [(name, t.shape, t.dtype, t.device, type(t)) for name, t in tensors]

    @override
    def norm(self) -> tuple[float, float]:
        squares, nonfinite = zip(*(norm_reference(bound.grad) for bound in self._bound), strict=True)
        return sum_over(self.process_groups, (sum(squares), sum(nonfinite)), self.entries[0].param.device)

    @override
    def step(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, statistics: bool
    ) -> Clipped:
        updates = [(self.rule, bound) for bound in self._bound]
        return self._step_each(updates, groups, numbers, grad_scale, statistics)

    def _step_each(
        self,
        updates: Iterable[tuple[Rule, Bound]],
        groups: Sequence[Group],
        numbers: Sequence[GroupNumbers],
        grad_scale: float,
        statistics: bool,
    ) -> Clipped:
        """Steps in order, with a rule per parameter; `updates` is advanced only after the previous update."""
        self.check()
        bounds: list[Bound] = []

        def each() -> Iterator[Asking[Done]]:
            for rule, bound in updates:
                bounds.append(bound)
                yield self._update(rule, bound, groups, numbers, grad_scale, statistics)

        results = self._finish(each())
        self._done = {bound.entry.tensor_index: done for bound, done in zip(bounds, results, strict=True)}
        parts = [done.clipped for done in results]
        return Clipped(sum(part.grad_sq for part in parts), sum(part.num for part in parts))

    def _update(
        self,
        rule: Rule,
        bound: Bound,
        groups: Sequence[Group],
        numbers: Sequence[GroupNumbers],
        grad_scale: float,
        statistics: bool,
    ) -> Asking[Done]:
        entry, state, grad = bound
        return step_reference_(
            rule,
            local(entry.param),
            grad,
            {name: local(t) for name, t in state.items()},
            entry.state_names,
            groups[entry.group_index],
            numbers[entry.group_index],
            average_name=self._average_name,
            grad_scale=grad_scale,
            tensor_index=entry.tensor_index,
            statistics=statistics,
            is_shard=bool(self.process_groups),
        )

    def _finish(self, updates: Iterable[Asking[Done]]) -> list[Done]:
        """The results of the updates, one after another."""
        return [alone(update) for update in updates]

    @override
    def statistics(self) -> dict[int, TensorStatistics]:
        return {index: each.statistics for index, each in self._done.items() if each.statistics is not None}

    @override
    def observed(self) -> Tensor:
        sums = [each.observed for each in self._done.values()]
        return torch.tensor(sums, dtype=torch.float64, device="cpu").sum(0)
