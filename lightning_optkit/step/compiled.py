# SPDX-License-Identifier: Apache-2.0
"""Parameters stepped by a compiled plan, which stores their addresses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_optkit._native import extension, node
from lightning_optkit._torch_private import local_shard
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.quantized_state import scale_name
from lightning_optkit.step.rule import Group, Rule, State
from lightning_optkit.step.segments import Entry, PlanOutdated, Segment, check_gradient
from lightning_optkit.step.shards import local, may_differ_in_placement, placed_like, sharding_groups, sum_over
from lightning_optkit.step.statistics import Clipped, TensorStatistics

__all__ = ["CompiledSegment"]


def _read_gradients(params: list[Tensor]) -> tuple[list[Tensor], list[int] | None]:
    """The gradients of `params`, and the indices of the parameters that have one; None: all."""
    pairs = [(i, grad) for i, param in enumerate(params) if (grad := param.grad) is not None]
    return [grad for _, grad in pairs], None if len(pairs) == len(params) else [i for i, _ in pairs]


def _gradients_of_shards(params: list[Tensor]) -> tuple[list[Tensor], list[int] | None]:
    """The same, faster for DTensors than the compiled look-up, which knows plain tensors alone."""
    grads = [*map(_grad_of, params)]
    return _read_gradients(params) if type(None) in {*map(type, grads)} else (grads, None)


_grad_of = attrgetter("grad")
_gradients: Callable[[list[Tensor]], tuple[list[Tensor], list[int] | None]]
_gradients = _read_gradients if node is None else node.gradients


@dataclass
class _Active:
    """The entries that have a gradient, as set in the plan."""

    places: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)


class CompiledSegment(Segment):
    """Parameters of one rule, compute precision and device, stepped by one compiled plan on CPU.

    Args:
        rule: The update rule.
        entries: The parameters.
        states: The state of each parameter, in the layout of the walk.
        average_name: Name of the average in the state, if there is one.
        owner: Name in error messages.
    """

    def __init__(
        self, rule: Rule, entries: Sequence[Entry], states: Sequence[State], average_name: str | None, owner: str
    ) -> None:
        assert extension is not None
        self.rule, self.entries, self._owner = rule, list(entries), owner
        self._params = [entry.param for entry in self.entries]
        self.process_groups = sharding_groups(self._params[0])
        kinds = {isinstance(param, DTensor) for param in self._params}
        self._are_local, self._are_sharded = True not in kinds, False not in kinds
        self._may_differ = any(may_differ_in_placement(param) for param in self._params)
        first = local(self._params[0])
        self._plan = extension.Plan(rule.name, first.dtype == torch.float64, self._device_number(first))
        for place, (entry, state) in enumerate(zip(self.entries, states, strict=True)):
            self._add(place, entry, state, average_name)
        self._active = _Active()
        self._states: Sequence[State] = []
        self._activate(list(range(len(self.entries))))

    def _device_number(self, param: Tensor) -> int:
        """The plan's device index: -1 for the CPU."""
        return -1

    def _row_of(self, place: int, entry: Entry) -> int:
        """The row of numbers that a tensor has in a walk: that of its group."""
        return entry.group_index

    def _add(self, place: int, entry: Entry, state: State, average_name: str | None) -> None:
        self._plan.add_tensor(
            param=entry.param,
            state=state,
            states=[name if name in entry.state_names else None for name in self.rule.state_names],
            scales=[scale_name(name) for name in self.rule.state_names],
            scalars=[scalar.name for scalar in self.rule.scalars] if entry.state_names else [],
            average=average_name,
            unsigned_states=sum(1 << k for k, spec in enumerate(self.rule.states) if spec.nonnegative),
            group=self._row_of(place, entry),
            tensor_index=entry.tensor_index,
        )

    def _activate(self, places: list[int]) -> None:
        self._plan.set_active(places)
        self._active = _Active(places, [self._params[i] for i in places])

    @override
    def bind(self, states: Sequence[State]) -> bool:
        self._states = states
        grads, places = (_gradients_of_shards if self._are_sharded else _gradients)(self._params)
        if places is not None or self._is_partial():
            places = list(range(len(grads))) if places is None else places
            if places != self._active.places:
                self._activate(places)
            states = [states[i] for i in places]
        params = self._active.params
        if self._may_differ:
            grads = [placed_like(grad, param) for grad, param in zip(grads, params, strict=True)]
        place = self._walk(self._plan.bind, params, states, grads)
        while place >= 0:
            grads[place] = self._fit(params[place], grads[place])
            before, place = place, self._walk(self._plan.bind, params, states, grads, place)
            if place == before:
                raise ValueError(f"{self._owner}.step: a gradient is a {type(grads[place]).__name__} without memory.")
        return bool(grads)

    def _fit(self, param: Tensor, grad: Tensor) -> Tensor:
        """A copy of `grad` that the plan can walk, if its dtype or layout allows one."""
        param, grad = local(param.detach()), local(grad)
        check_gradient(self._owner, param, grad)
        dense = grad.to_dense() if grad.layout != torch.strided else grad
        return torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device=param.device).copy_(dense)

    @override
    def release(self) -> None:
        self._plan.release()
        self._states = []

    @override
    def check(self) -> None:
        self._walk(self._plan.check)

    def _walk(self, walk: Callable[..., Any], *arguments: object, **named: object) -> Any:
        """Calls the plan, which checks everything that it will touch before it walks.

        Raises:
            PlanOutdated: if a parameter or its state moved since the segment was made, or a gradient since it was
                bound; nothing was written.
        """
        try:
            return walk(*arguments, **named)
        except extension.Moved:  # type: ignore[union-attr]
            raise PlanOutdated from None

    @override
    def idle(self) -> list[tuple[Entry, State]]:
        if not self._is_partial():
            return []
        active = set(self._active.places)
        return [pair for i, pair in enumerate(zip(self.entries, self._states, strict=True)) if i not in active]

    def _is_partial(self) -> bool:
        return len(self._active.places) != len(self._params)

    @override
    def norm(self) -> tuple[float, float]:
        return sum_over(self.process_groups, self._walk(self._plan.norm), self._params[0].device)

    @override
    def step(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, statistics: bool
    ) -> Clipped:
        clipped = Clipped(*self._walk(self._plan.step, self._rows(groups, numbers), grad_scale, statistics))
        self._mark_written()
        return clipped

    def _rows(self, groups: Sequence[Group], numbers: Sequence[GroupNumbers]) -> list[tuple[float, ...]]:
        """The row of each group for the plan."""
        return [(*n, *self.rule.hyperparameters(g).values()) for n, g in zip(numbers, groups, strict=True)]

    def _mark_written(self) -> None:
        # The version counters must change, so that autograd detects stale saved tensors.
        params = self._active.params
        if not self._are_local:  # `map` takes half the time, and a step over many shards is mostly such time
            params = [*map(local_shard, params)] if self._are_sharded else [local(param) for param in params]
        torch.autograd.graph.increment_version(params)

    @override
    def observed(self) -> Tensor:
        return torch.tensor(self._plan.observed(), dtype=torch.float64, device="cpu")

    @override
    def statistics(self) -> dict[int, TensorStatistics]:
        sums = self._plan.sums()
        return {self.entries[i].tensor_index: TensorStatistics(*sums[i]) for i in self._active.places}
