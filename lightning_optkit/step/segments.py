# SPDX-License-Identifier: Apache-2.0
"""Parameters that take the same path. Every kind of segment has the same interface: bind, norm, step, statistics."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_optkit._native import extension, why_no_cuda_kernels, why_no_look
from lightning_optkit.step.gradient_reference import norm_reference
from lightning_optkit.step.lockstep import Asking, alone
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.plain import has_dispatch, has_lost_memory, is_dense
from lightning_optkit.step.reference import Done, step_reference_
from lightning_optkit.step.rule import Group, Rule, State
from lightning_optkit.step.shards import local, placed_like, sharding_groups, sum_over
from lightning_optkit.step.statistics import Clipped, TensorStatistics

__all__ = [
    "COMPILED_DTYPES",
    "Bound",
    "Entry",
    "PlanOutdated",
    "ReferenceSegment",
    "Segment",
    "check_gradient",
    "why_no_units",
    "why_not_compiled",
]

COMPILED_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""Values of DType in csrc/core/tables.h."""


class PlanOutdated(Exception):
    """A parameter, a group or a state changed since the plan was built."""


@dataclass(frozen=True)
class Entry:
    """One parameter, the names of its rule's states, its group, and its number in the optimizer.

    Its state is looked up in the optimizer at every step.
    """

    param: Tensor
    state_names: tuple[str, ...]
    group_index: int
    tensor_index: int


class Bound(NamedTuple):
    """An entry during one step: its state, and its gradient or the local part of it."""

    entry: Entry
    state: State
    grad: Tensor


class Segment(Protocol):
    """Parameters that are stepped together. All methods except `bind` apply to those with a gradient."""

    steps_on_device: ClassVar[bool] = False
    """Whether its gradient factor stays on the device (an attribute, since `isinstance` of a Protocol takes
    microseconds)."""

    is_left_out: bool = False
    """Whether the clip leaves its parameters out."""

    rule: Rule
    entries: list[Entry]
    process_groups: tuple[Any, ...]

    def __init__(
        self, rule: Rule, entries: Sequence[Entry], states: Sequence[State], average_name: str | None, owner: str
    ) -> None: ...

    def bind(self, states: Sequence[State]) -> bool:
        """Binds this step's gradients and the current state of the entries; False if there is no gradient.

        Raises:
            PlanOutdated: if a parameter or its state changed its form since the segment was made.
            ValueError: if a gradient does not fit its parameter.
        """
        ...

    def release(self) -> None:
        """Drops the references to gradients and state."""
        ...

    def check(self) -> None:
        """Raises PlanOutdated if a walk would, and ValueError if a gradient does not fit."""
        ...

    def idle(self) -> list[tuple[Entry, State]]:
        """Entries without a gradient in this step, with their state."""
        ...

    def norm(self) -> tuple[float, float]:
        """Sum of squares and number of non-finite elements of the gradients, over all processes that shard them."""
        ...

    def step(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, statistics: bool
    ) -> Clipped:
        """Updates the parameters in one walk through memory."""
        ...

    def observed(self) -> Tensor:
        """The sums of the last step for a rule with an estimate: shape (2,), fp64."""
        ...

    def statistics(self) -> dict[int, TensorStatistics]:
        """The statistics of the last step, by parameter number."""
        ...


def why_not_compiled(param: Tensor) -> str | None:
    """Why a parameter takes the reference path, or None."""
    if extension is None:
        return "no compiled extension"
    if why_no_look:
        return why_no_look
    if has_dispatch(param):
        return f"a {type(param).__name__} has no plain memory of its own"
    if param.device.type == "cuda":
        reason = why_no_cuda_kernels()
        if reason is not None:
            return reason
    elif param.device.type != "cpu":
        return f"no kernel for device {param.device.type}"
    if param.dtype not in COMPILED_DTYPES:
        return f"no kernel for {str(param.dtype).removeprefix('torch.')}"
    if param.layout != torch.strided:
        return f"no kernel for {param.layout}"
    if param.is_neg():
        return "its negation bit is set"
    if not is_dense(param):
        return "its memory has gaps or overlaps"
    return None if extension.is_plain(param) else "it has no plain memory of its own"


def why_no_units(param: Tensor) -> str | None:
    """Why the walk cannot treat rows of the first dimension separately, or None."""
    if param.ndim < 2 or param.numel() == 0 or param.shape[0] == 1:
        return None
    return None if param.stride(0) == param[0].numel() else "its first dimension is not outermost in memory"


def check_gradient(owner: str, param: Tensor, grad: Tensor) -> None:
    """Raises ValueError, or TypeError for a non-tensor, if no copy of `grad` could fit `param`."""
    if not isinstance(grad, Tensor):
        raise TypeError(f"{owner}.step: a gradient is a {type(grad).__name__}; it must be a tensor.")
    if grad.shape != param.shape:
        raise ValueError(
            f"{owner}.step: a gradient has shape {list(grad.shape)}, but its parameter has shape {list(param.shape)}."
        )
    if grad.device != param.device:
        raise ValueError(f"{owner}.step: a gradient is on {grad.device}, but its parameter is on {param.device}.")
    if torch.is_complex(grad) and not torch.is_complex(param):
        raise ValueError(f"{owner}.step: a gradient is {grad.dtype}, but its parameter is {param.dtype}.")
    if grad.is_quantized:
        raise ValueError(f"{owner}.step: a gradient is quantized ({grad.dtype}); call dequantize() before.")
    if has_dispatch(grad) and not has_dispatch(param):
        raise ValueError(f"{owner}.step: a gradient is a {type(grad).__name__}, but its parameter is a plain tensor.")
    if has_lost_memory(grad):
        raise ValueError(f"{owner}.step: the storage of a gradient holds less than its shape {list(grad.shape)} needs.")


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
