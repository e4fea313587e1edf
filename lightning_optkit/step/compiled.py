# SPDX-License-Identifier: Apache-2.0
"""Parameters walked by a compiled plan, which holds their addresses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optkit._native import extension
from lightning_optkit.step.codes import NONNEGATIVE, scale_name
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.rule import Group, Rule, State
from lightning_optkit.step.segments import Entry, PlanOutdated, check_gradient
from lightning_optkit.step.shards import local, sharding_groups
from lightning_optkit.step.statistics import Clipped, TensorStatistics

__all__ = ["CompiledSegment"]


@dataclass
class _Active:
    """Which entries have a gradient, as the plan knows it."""

    places: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)


class CompiledSegment:
    """Parameters of one rule, one precision and one device, walked by one compiled plan: on CPU.

    Args:
        rule: The update rule.
        entries: The parameters.
        states: The state of each, laid out for the walk.
        average_name: Name of the average in it, if one is kept.
        owner: For messages.
    """

    def __init__(
        self, rule: Rule, entries: Sequence[Entry], states: Sequence[State], average_name: str | None, owner: str
    ) -> None:
        assert extension is not None
        self.rule, self.entries, self._owner = rule, list(entries), owner
        self._params = [entry.param for entry in self.entries]
        self.process_groups = sharding_groups(self._params[0])
        self._are_local = not any(isinstance(param, DTensor) for param in self._params)
        first = local(self._params[0])
        self._plan = extension.Plan(rule.name, first.dtype == torch.float64, self._device_number(first))
        for entry, state in zip(self.entries, states, strict=True):
            self._add(entry, state, average_name)
        self._active = _Active()
        self._states: Sequence[State] = []
        self._activate(list(range(len(self.entries))))

    def _device_number(self, param: Tensor) -> int:
        """As the plan knows it: -1 for the CPU."""
        return -1

    def _add(self, entry: Entry, state: State, average_name: str | None) -> None:
        self._plan.add_tensor(
            param=entry.param,
            state=state,
            states=[name if name in entry.held else None for name in self.rule.states],
            scales=[scale_name(name) for name in self.rule.states],
            scalars=[scalar.name for scalar in self.rule.scalars] if entry.held else [],
            average=average_name,
            unsigned_states=sum(1 << k for k, name in enumerate(self.rule.states) if name in NONNEGATIVE),
            group=entry.group_index,
            tensor_index=entry.tensor_index,
        )

    def _activate(self, places: list[int]) -> None:
        self._plan.set_active(places)
        self._active = _Active(places, [self._params[i] for i in places])

    def bind(self, states: Sequence[State]) -> bool:
        """Takes this step's gradients, and the entries' state as it is now; False if there is no gradient.

        Raises:
            PlanOutdated: if a parameter has another layout than when the segment was made.
            ValueError: if a gradient does not fit its parameter.
        """
        self._states = states
        grads = [grad for p in self._params if (grad := p.grad) is not None]
        if len(grads) != len(self._params) or self._is_partial():
            found = [p.grad for p in self._params]
            places = [i for i, grad in enumerate(found) if grad is not None]
            grads = [grad for grad in found if grad is not None]
            if places != self._active.places:
                self._activate(places)
            states = [states[i] for i in places]
        params = self._active.params
        place = self._walk(self._plan.bind, params, states, grads)
        while place >= 0:
            grads[place] = self._fit(params[place], grads[place])
            before, place = place, self._walk(self._plan.bind, params, states, grads, place)
            if place == before:
                raise ValueError(f"{self._owner}.step: a gradient is a {type(grads[place]).__name__} without memory.")
        return bool(grads)

    def _fit(self, param: Tensor, grad: Tensor) -> Tensor:
        """A copy of `grad` that the plan can walk, where its dtype or layout allows it."""
        param, grad = local(param.detach()), local(grad)
        check_gradient(self._owner, param, grad)
        dense = grad.to_dense() if grad.layout != torch.strided else grad
        return torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device=param.device).copy_(dense)

    def release(self) -> None:
        """Lets go of gradients and state."""
        self._plan.release()
        self._states = []

    def check(self) -> None:
        """Raises PlanOutdated if a walk would."""
        self._walk(self._plan.check)

    def _walk(self, walk: Callable[..., Any], *arguments: object, **named: object) -> Any:
        """Calls the plan, which looks at everything that it will touch before it walks.

        Raises:
            PlanOutdated: if a parameter or its state does not lie where it lay when the segment was made, or a gradient
                not where it was bound; nothing was written.
        """
        try:
            return walk(*arguments, **named)
        except extension.Moved:  # type: ignore[union-attr]
            raise PlanOutdated from None

    def idle(self) -> list[tuple[Entry, State]]:
        """Entries without a gradient in this step, and their state."""
        active = set(self._active.places)
        pairs = zip(self.entries, self._states, strict=True)
        return [pair for i, pair in enumerate(pairs) if i not in active] if self._is_partial() else []

    def _is_partial(self) -> bool:
        return len(self._active.places) != len(self._params)

    def norm(self) -> tuple[float, float]:
        """Sum of squares and number of non-finite elements of the gradients."""
        result: tuple[float, float] = self._walk(self._plan.norm)
        return result

    def step(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, statistics: bool
    ) -> Clipped:
        """Updates the bound parameters in one walk through memory."""
        clipped = Clipped(*self._walk(self._plan.step, self._rows(groups, numbers), grad_scale, statistics))
        self._mark_written()
        return clipped

    def _rows(self, groups: Sequence[Group], numbers: Sequence[GroupNumbers]) -> list[tuple[float, ...]]:
        """What the plan reads of each group."""
        return [n + self.rule.hypers(g) for n, g in zip(numbers, groups, strict=True)]

    def _mark_written(self) -> None:
        # What autograd saved for a backward pass is stale now, and must be found to be.
        params = self._active.params
        torch.autograd.graph.increment_version(params if self._are_local else [local(p) for p in params])

    def observed(self) -> Tensor:
        """What a rule with an estimate observed in the last step: shape (2,), fp64, on the device."""
        return torch.tensor(self._plan.observed(), dtype=torch.float64)

    def statistics(self) -> dict[int, TensorStatistics]:
        """By number of the parameter."""
        sums = self._plan.sums()
        return {self.entries[i].tensor_index: TensorStatistics(*sums[i]) for i in self._active.places}
