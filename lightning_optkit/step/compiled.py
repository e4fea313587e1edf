# SPDX-License-Identifier: Apache-2.0
"""Parameters walked by a compiled plan, which holds their addresses."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optkit._native import extension, has_exchange
from lightning_optkit.step.codes import NONNEGATIVE, scale_name
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.rule import Group, Rule
from lightning_optkit.step.segments import COMPILED_DTYPES, Entry, PlanOutdated, check_gradient
from lightning_optkit.step.shards import local, sharding_groups
from lightning_optkit.step.statistics import Clipped, TensorStatistics

__all__ = ["CompiledSegment"]

_CODE8 = 4  # DType::kCode8 in csrc/core/tables.h
_PARAM_MOVED = 1  # Misfit::kParamMoved in csrc/bindings/plan.h


@dataclass
class _Binding:
    """Which entries are active, as the plan knows it."""

    places: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)


class CompiledSegment:
    """Parameters of one rule, one precision and one device, walked by one compiled plan: on CPU."""

    def __init__(self, rule: Rule, entries: Sequence[Entry], average_name: str | None, owner: str) -> None:
        assert extension is not None
        self.rule, self.entries, self._owner = rule, list(entries), owner
        self._params = [entry.param for entry in self.entries]
        self.process_groups = sharding_groups(self._params[0])
        self._are_local = not any(isinstance(param, DTensor) for param in self._params)
        first = local(self._params[0])
        self._plan = extension.Plan(rule.name, first.dtype == torch.float64, self._device_number(first))
        for entry in self.entries:
            self._add(entry, average_name)
        self._active = _Binding()
        self._copies: list[Tensor] = []
        self._activate(list(range(len(self.entries))))

    def _device_number(self, param: Tensor) -> int:
        """As the plan knows it: -1 for the CPU."""
        return -1

    def _add(self, entry: Entry, average_name: str | None) -> None:
        state, param = {name: local(t) for name, t in entry.state.items()}, local(entry.param)
        held = [state[name] if name in entry.held else None for name in self.rule.states]
        scalars = [state[scalar.name].data_ptr() if entry.held else 0 for scalar in self.rule.scalars]
        average = state.get(average_name) if average_name else None
        compensation = state.get("compensation")
        narrow = [name for name in entry.held if name not in self.rule.wide]
        typical = state[narrow[0]] if narrow else param
        self._plan.add_tensor(
            param=param.data_ptr(),
            states=[0 if t is None else t.data_ptr() for t in held],
            state_scales=[
                state[scale].data_ptr() if scale in state else 0 for scale in map(scale_name, self.rule.states)
            ],
            unsigned_states=sum(1 << k for k, name in enumerate(self.rule.states) if name in NONNEGATIVE),
            scalars=scalars,
            average=0 if average is None else average.data_ptr(),
            compensation=0 if compensation is None else compensation.data_ptr(),
            step=state["step"].data_ptr(),
            num_averaged=state["num_averaged"].data_ptr() if average is not None else 0,
            sizes=param.shape,
            strides=param.stride(),
            param_type=COMPILED_DTYPES[param.dtype],
            state_type=_CODE8 if typical.dtype == torch.uint8 else COMPILED_DTYPES[typical.dtype],
            average_type=COMPILED_DTYPES[(param if average is None else average).dtype],
            group=entry.group_index,
            tensor_index=entry.tensor_index,
        )

    def _activate(self, places: list[int]) -> None:
        self._plan.set_active(places)
        self._active = _Binding(places, [self._params[i] for i in places])

    def bind(self) -> bool:
        """Points the plan at this step's gradients; False if there is none.

        Raises:
            PlanOutdated: if a parameter's memory moved.
            ValueError: if a gradient does not fit its parameter.
        """
        self._copies = []
        grads = [grad for p in self._params if (grad := p.grad) is not None]
        if len(grads) != len(self._params) or self._is_partial():
            places = [i for i, p in enumerate(self._params) if p.grad is not None]
            if places != self._active.places:
                self._activate(places)
        params = self._active.params
        if not self._are_local:
            params, grads = [local(p) for p in params], [local(grad) for grad in grads]
        while (misfit := self._point_at(params, grads)) >= 0:
            place, kind = divmod(misfit, 8)
            grads[place] = self._fit(params[place], grads[place], kind)
        return bool(grads)

    def _point_at(self, params: list[Tensor], grads: list[Tensor]) -> int:
        """-1, or 8 * (place in the lists) + Misfit of csrc/bindings/plan.h."""
        if has_exchange:
            return int(self._plan.bind(params, grads))
        return int(torch.ops.lightning_optkit.plan_bind(self._plan.id, params, grads))

    def _fit(self, param: Tensor, grad: Tensor, misfit: int) -> Tensor:
        """A copy of `grad` that the plan can walk, where its dtype or layout allows it."""
        if misfit == _PARAM_MOVED:
            raise PlanOutdated
        check_gradient(self._owner, param, grad)
        dense = grad.to_dense() if grad.layout != torch.strided else grad
        copy = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device=param.device).copy_(dense)
        self._copies.append(copy)
        return copy

    def idle(self) -> list[Entry]:
        """Entries without a gradient in this step."""
        active = set(self._active.places)
        return [entry for i, entry in enumerate(self.entries) if i not in active] if self._is_partial() else []

    def _is_partial(self) -> bool:
        return len(self._active.places) != len(self._params)

    def norm(self) -> tuple[float, float]:
        """Sum of squares and number of non-finite elements of the gradients."""
        result: tuple[float, float] = self._plan.norm()
        return result

    def step(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, statistics: bool
    ) -> Clipped:
        """Updates the bound parameters in one walk through memory."""
        self._hand_over_groups(groups, numbers)
        clipped = Clipped(*self._plan.step(grad_scale, statistics))
        self._done()
        return clipped

    def _hand_over_groups(self, groups: Sequence[Group], numbers: Sequence[GroupNumbers]) -> None:
        rows = [n + self.rule.hypers(g) for n, g in zip(numbers, groups, strict=True)]
        self._plan.set_groups(rows)

    def _done(self) -> None:
        # What autograd saved for a backward pass is stale now, and must be found to be.
        params = self._active.params
        torch.autograd.graph.increment_version(params if self._are_local else [local(p) for p in params])
        self._copies = []

    def observed(self) -> Tensor:
        """What a rule with an estimate observed in the last step: shape (2,), fp64, on the device."""
        return torch.tensor(self._plan.observed(), dtype=torch.float64)

    def statistics(self) -> dict[int, TensorStatistics]:
        """By number of the parameter."""
        sums = self._plan.sums()
        return {self.entries[i].tensor_index: TensorStatistics(*sums[i]) for i in self._active.places}
