# SPDX-License-Identifier: Apache-2.0
"""Parameters that take the same path. The optimizer asks every kind the same: bind, norm, step, statistics."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit._native import extension, why_no_cuda_kernels
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.reference import Done, norm_reference, step_reference_
from lightning_optkit.step.rule import Group, Rule, State
from lightning_optkit.step.shards import local, sharding_groups
from lightning_optkit.step.statistics import Clipped, TensorStatistics

__all__ = [
    "COMPILED_DTYPES",
    "Entry",
    "PlanOutdated",
    "ReferenceSegment",
    "check_gradient",
    "why_no_units",
    "why_not_compiled",
]

COMPILED_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""As DType in csrc/core/tables.h."""


class PlanOutdated(Exception):
    """A parameter's memory or shape changed since the plan was built."""


@dataclass
class Entry:
    """One parameter with its state and the rule's part of it, its group, and its number in the optimizer."""

    param: Tensor
    state: State
    held: tuple[str, ...]
    group_index: int
    tensor_index: int


def why_not_compiled(param: Tensor) -> str | None:
    """The reason why a parameter takes the reference path, or None."""
    if extension is None:
        return "no compiled extension"
    if param.device.type == "cuda":
        reason = why_no_cuda_kernels()
        if reason is not None:
            return reason
    elif param.device.type != "cpu":
        return f"no kernel for device {param.device.type}"
    if param.dtype not in COMPILED_DTYPES:
        return f"no kernel for {str(param.dtype).removeprefix('torch.')}"
    if not is_dense(param):
        return "its memory has gaps or overlaps"
    return None


def why_no_units(param: Tensor) -> str | None:
    """The reason why the walk cannot treat rows of the first dimension by themselves, or None."""
    if param.ndim < 2 or param.numel() == 0 or param.shape[0] == 1:
        return None
    return None if param.stride(0) == param[0].numel() else "its first dimension is not outermost in memory"


def is_dense(t: Tensor) -> bool:
    """True if the elements fill a block of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def check_gradient(owner: str, param: Tensor, grad: Tensor) -> None:
    """Raises ValueError if no copy could make `grad` fit `param`."""
    if grad.shape != param.shape:
        raise ValueError(
            f"{owner}.step: a gradient has shape {list(grad.shape)}, but its parameter has shape {list(param.shape)}."
        )
    if grad.device != param.device:
        raise ValueError(f"{owner}.step: a gradient is on {grad.device}, but its parameter is on {param.device}.")
    if torch.is_complex(grad) and not torch.is_complex(param):
        raise ValueError(f"{owner}.step: a gradient is {grad.dtype}, but its parameter is {param.dtype}.")


class ReferenceSegment:
    """Parameters updated by plain PyTorch, one after another."""

    def __init__(self, rule: Rule, entries: Sequence[Entry], average_name: str | None, owner: str) -> None:
        self.rule, self.entries, self._average_name, self._owner = rule, list(entries), average_name, owner
        self.process_groups = sharding_groups(self.entries[0].param)
        self._bound: list[tuple[Entry, Tensor]] = []
        self._done: dict[int, Done] = {}

    def bind(self) -> bool:
        """Takes this step's gradients; False if there is none.

        Raises:
            PlanOutdated: if a parameter has another shape than its state.
            ValueError: if a gradient does not fit its parameter.
        """
        self._bound = [(entry, local(entry.param.grad)) for entry in self.entries if entry.param.grad is not None]
        for entry, grad in self._bound:
            if any(entry.state[name].shape != self.rule.shape_of(name, entry.param) for name in entry.held):
                raise PlanOutdated
            check_gradient(self._owner, local(entry.param), grad)
        return bool(self._bound)

    def idle(self) -> list[Entry]:
        """Entries without a gradient in this step."""
        active = {id(entry) for entry, _ in self._bound}
        return [entry for entry in self.entries if id(entry) not in active]

    def norm(self) -> tuple[float, float]:
        """Sum of squares and number of non-finite elements of the gradients."""
        squares, nonfinite = zip(*(norm_reference(grad) for _, grad in self._bound), strict=True)
        return sum(squares), sum(nonfinite)

    def step(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, statistics: bool
    ) -> Clipped:
        """Updates the bound parameters."""
        updates = [(self.rule, entry, grad) for entry, grad in self._bound]
        return self._step_each(updates, groups, numbers, grad_scale, statistics)

    def _step_each(
        self,
        updates: Iterable[tuple[Rule, Entry, Tensor]],
        groups: Sequence[Group],
        numbers: Sequence[GroupNumbers],
        grad_scale: float,
        statistics: bool,
    ) -> Clipped:
        """The same with a rule for each, in the order given; each is asked for when those before it are done."""
        done = {
            entry.tensor_index: step_reference_(
                rule,
                local(entry.param),
                grad,
                {name: local(t) for name, t in entry.state.items()},
                entry.held,
                groups[entry.group_index],
                numbers[entry.group_index],
                average_name=self._average_name,
                grad_scale=grad_scale,
                tensor_index=entry.tensor_index,
                statistics=statistics,
            )
            for rule, entry, grad in updates
        }
        self._done = done
        parts = [each.clipped for each in done.values()]
        return Clipped(sum(part.grad_sq for part in parts), sum(part.num for part in parts))

    def statistics(self) -> dict[int, TensorStatistics]:
        """By number of the parameter."""
        return {index: each.statistics for index, each in self._done.items() if each.statistics is not None}

    def observed(self) -> Tensor:
        """What a rule with an estimate observed in the last step: shape (2,), fp64."""
        sums = [each.observed for each in self._done.values()]
        return torch.tensor(sums, dtype=torch.float64).sum(0)
