# SPDX-License-Identifier: Apache-2.0
"""Parameters that take the same path. The optimizer asks both kinds the same four things: bind, norm, step, statistics."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_optkit._native import extension
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.reference import norm_reference, step_reference_
from lightning_optkit.step.rule import Group, Rule, State
from lightning_optkit.step.statistics import TensorStatistics

__all__ = ["CompiledSegment", "Entry", "PlanOutdated", "ReferenceSegment", "why_not_compiled"]

_DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_PARAM_MOVED, _SHAPE, _DEVICE, _DTYPE_MISFIT, _LAYOUT = 1, 2, 3, 4, 5


class PlanOutdated(Exception):  # noqa: N818  (no error: the caller builds a new plan)
    """A parameter's memory moved since the plan was built."""


@dataclass
class Entry:
    """One parameter with its state, its group, and its number among all parameters of the optimizer."""

    param: Tensor
    state: State
    group_index: int
    tensor_index: int


def why_not_compiled(param: Tensor) -> str | None:
    """The reason why a parameter takes the reference path, or None."""
    if extension is None:
        return "no compiled extension"
    if param.device.type != "cpu":
        return f"no kernel for device {param.device.type}"
    if param.dtype not in _DTYPE:
        return f"no kernel for {str(param.dtype).removeprefix('torch.')}"
    if not is_dense(param):
        return "its memory has gaps or overlaps"
    return None


def is_dense(t: Tensor) -> bool:
    """True if the elements fill a block of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


class ReferenceSegment:
    """Parameters updated by plain PyTorch, one after another."""

    def __init__(self, rule: Rule, entries: Sequence[Entry], average_name: str | None) -> None:
        self.rule, self.entries, self._average_name = rule, list(entries), average_name
        self._bound: list[tuple[Entry, Tensor]] = []
        self._statistics: dict[int, TensorStatistics] = {}

    def bind(self) -> bool:
        """Takes this step's gradients; False if there is none."""
        self._bound = [(entry, entry.param.grad) for entry in self.entries if entry.param.grad is not None]
        return bool(self._bound)

    def norm(self) -> tuple[float, float]:
        """Sum of squares and number of non-finite elements of the gradients."""
        squares, nonfinite = zip(*(norm_reference(grad) for _, grad in self._bound), strict=True)
        return sum(squares), sum(nonfinite)

    def step(self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, _: bool) -> None:
        """Updates the bound parameters."""
        self._statistics = {
            entry.tensor_index: step_reference_(
                self.rule,
                entry.param,
                grad,
                entry.state,
                groups[entry.group_index],
                numbers[entry.group_index],
                average_name=self._average_name,
                grad_scale=grad_scale,
                tensor_index=entry.tensor_index,
            )
            for entry, grad in self._bound
        }

    def statistics(self) -> dict[int, TensorStatistics]:
        """By number of the parameter."""
        return self._statistics


@dataclass
class _Binding:
    """Which entries are active, as the plan knows it."""

    places: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)


class CompiledSegment:
    """Parameters of one rule and one precision, walked by one compiled plan."""

    def __init__(self, rule: Rule, entries: Sequence[Entry], average_name: str | None, owner: str) -> None:
        assert extension is not None
        self.rule, self.entries, self._owner = rule, list(entries), owner
        self._params = [entry.param for entry in self.entries]
        is_double = self._params[0].dtype == torch.float64
        self._plan = extension.Plan(rule.name, is_double)
        for entry in self.entries:
            self._add(entry, average_name)
        self._active = _Binding()
        self._copies: list[Tensor] = []
        self._activate(list(range(len(self.entries))))

    def _add(self, entry: Entry, average_name: str | None) -> None:
        state, param = entry.state, entry.param
        held = [state.get(name) for name in self.rule.states]
        average = state.get(average_name) if average_name else None
        compensation = state.get("compensation")
        first_state = next((t for t in held if t is not None), param)
        self._plan.add_tensor(
            param=param.data_ptr(),
            states=[0 if t is None else t.data_ptr() for t in held],
            average=0 if average is None else average.data_ptr(),
            compensation=0 if compensation is None else compensation.data_ptr(),
            step=state["step"].data_ptr(),
            num_averaged=state["num_averaged"].data_ptr() if average is not None else 0,
            sizes=param.shape,
            strides=param.stride(),
            param_type=_DTYPE[param.dtype],
            state_type=_DTYPE[first_state.dtype],
            average_type=_DTYPE[(param if average is None else average).dtype],
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
        if len(grads) != len(self._params) or len(self._active.places) != len(self._params):
            places = [i for i, p in enumerate(self._params) if p.grad is not None]
            if places != self._active.places:
                self._activate(places)
        while (misfit := torch.ops.lightning_optkit.plan_bind(self._plan.id, self._active.params, grads)) >= 0:
            place, kind = divmod(misfit, 8)
            grads[place] = self._fit(self._active.params[place], grads[place], kind)
        return bool(grads)

    def _fit(self, param: Tensor, grad: Tensor, misfit: int) -> Tensor:
        """A copy of `grad` that the plan can walk, where its dtype or layout allows it."""
        if misfit == _PARAM_MOVED:
            raise PlanOutdated
        if misfit == _SHAPE and grad.shape == param.shape:
            raise PlanOutdated
        if misfit == _SHAPE:
            raise ValueError(
                f"{self._owner}.step: a gradient has shape {list(grad.shape)}, but its parameter has shape "
                f"{list(param.shape)}."
            )
        if misfit == _DEVICE:
            raise ValueError(
                f"{self._owner}.step: a gradient is on {grad.device}, but its parameter is on {param.device}."
            )
        if torch.is_complex(grad):
            raise ValueError(f"{self._owner}.step: a gradient is {grad.dtype}, but its parameter is {param.dtype}.")
        dense = grad.to_dense() if grad.layout != torch.strided else grad
        copy = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device=param.device).copy_(dense)
        self._copies.append(copy)
        return copy

    def norm(self) -> tuple[float, float]:
        """Sum of squares and number of non-finite elements of the gradients."""
        result: tuple[float, float] = self._plan.norm()
        return result

    def step(self, _: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, statistics: bool) -> None:
        """Updates the bound parameters in one walk through memory."""
        self._plan.set_groups([n.row() + list(self._hypers(g)) for n, g in zip(numbers, _, strict=True)])
        self._plan.step(grad_scale, statistics)
        torch.autograd.graph.increment_version(self._active.params)
        self._copies = []

    def _hypers(self, group: Group) -> tuple[float, ...]:
        return self.rule.hypers(group)

    def statistics(self) -> dict[int, TensorStatistics]:
        """By number of the parameter."""
        sums = self._plan.sums()
        return {self.entries[i].tensor_index: TensorStatistics(*sums[i]) for i in self._active.places}
