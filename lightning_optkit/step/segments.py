# SPDX-License-Identifier: Apache-2.0
"""The interface of every segment, parameters that take the same path: bind, norm, step, statistics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_optkit._native import extension, why_no_cuda_kernels, why_no_look
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.plain import has_dispatch, has_lost_memory, is_dense
from lightning_optkit.step.rule import Group, Rule, State
from lightning_optkit.step.statistics import Clipped, TensorStatistics

__all__ = [
    "Bound",
    "Entry",
    "PlanOutdated",
    "Segment",
    "check_gradient",
    "why_no_units",
    "why_not_compiled",
]

_COMPILED_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
"""Those of DType in csrc/core/tables.h."""


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
    if param.dtype not in _COMPILED_DTYPES:
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
