# SPDX-License-Identifier: Apache-2.0
"""Which tensors `optimizer.state` holds, and in which dtype."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit.step.memory import zeros_like_all
from lightning_optkit.step.numbers import compute_dtype
from lightning_optkit.step.rule import Average, Group, State
from lightning_optkit.step.segments import Entry

__all__ = ["COUNTERS", "StateLayout", "create_missing_state"]

COUNTERS = ("step", "num_averaged")


@dataclass(frozen=True)
class StateLayout:
    """The dtype of each state tensor.

    Args:
        average: The average to keep, if any.
        state_dtype: Dtype of the rule's own state beside parameters of at most 32 bits.
    """

    average: Average | None
    state_dtype: torch.dtype

    @property
    def average_name(self) -> str | None:
        """Name of the average in the state."""
        return self.average.state_name if self.average else None

    def dtype_of(self, name: str, param: Tensor) -> torch.dtype:
        """Dtype of the state `name` of `param`."""
        if name in COUNTERS:
            return torch.float32
        if name == "compensation":
            return param.dtype
        real = torch.float32 if name == self.average_name else self.state_dtype
        real = torch.float64 if compute_dtype(param) == torch.float64 else real
        if param.dtype.is_complex:
            return torch.complex128 if real == torch.float64 else torch.complex64
        return real

    def names(self, held: Sequence[str], group: Group) -> list[str]:
        """Names of all tensors, not counters, that a parameter of the group holds."""
        names = list(held)
        if group["rounding"] == "kahan":
            names.append("compensation")
        if self.average_name:
            names.append(self.average_name)
        return names


def create_missing_state(entries: Sequence[tuple[Entry, Group, Sequence[str]]], layout: StateLayout) -> None:
    """Adds zeros for every tensor that a state lacks, and its counters."""
    missing: list[tuple[State, str, Tensor]] = []
    for entry, group, held in entries:
        for name in layout.names(held, group):
            if entry.state.get(name) is None:
                missing.append((entry.state, name, entry.param))
    created = zeros_like_all(
        [param for _, _, param in missing], [layout.dtype_of(name, param) for _, name, param in missing]
    )
    for (state, name, _), tensor in zip(missing, created, strict=True):
        state[name] = tensor
    _create_missing_counters(entries, layout)


def _create_missing_counters(entries: Sequence[tuple[Entry, Group, Sequence[str]]], layout: StateLayout) -> None:
    """Counters are views of one tensor: 0-d, as torch has them, without an allocation each."""
    names = COUNTERS if layout.average_name else COUNTERS[:1]
    missing = [(entry, name) for entry, _, _ in entries for name in names if name not in entry.state]
    if not missing:
        return
    # On CUDA they live on the device: a skipped step must not advance them, and only the device knows of it.
    counters = torch.zeros(len(missing), device=missing[0][0].param.device)
    for (entry, name), counter in zip(missing, counters.unbind(), strict=True):
        entry.state[name] = counter
