# SPDX-License-Identifier: Apache-2.0
"""Which tensors `optimizer.state` holds, in which dtype and layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optkit.step.codes import NONNEGATIVE, decode, encode_, scale_name, zero_scales
from lightning_optkit.step.memory import zeros_like_all
from lightning_optkit.step.numbers import compute_dtype
from lightning_optkit.step.reference import as_real
from lightning_optkit.step.rule import Average, Group, Rule, Scalar, State
from lightning_optkit.step.segments import Entry
from lightning_optkit.step.shards import distribute_like, local, place_like

__all__ = ["StateLayout", "check_state_shapes", "convert_", "prepare_state"]

_STEP, _NUM_AVERAGED = Scalar("step", 0.0, 1.0), Scalar("num_averaged", 0.0, 1.0)


@dataclass(frozen=True)
class StateLayout:
    """The dtype of each state tensor.

    Args:
        average: The average to keep, if any.
        state_dtype: Dtype of the rule's own state beside real parameters of at most 32 bits; "int8": codes of
            `lightning_optkit.step.codes`, held as uint8.
    """

    average: Average | None
    state_dtype: torch.dtype | Literal["int8"]

    @property
    def average_name(self) -> str | None:
        """Name of the average in the state."""
        return self.average.state_name if self.average else None

    def dtype_of(self, name: str, param: Tensor, rule: Rule) -> torch.dtype:
        """Dtype of the state tensor `name` of `param`."""
        if name == "compensation":
            return param.dtype
        if compute_dtype(param) == torch.float64:
            return torch.complex128 if param.dtype.is_complex else torch.float64
        if param.dtype.is_complex:
            return torch.complex64
        if name == self.average_name or name in rule.wide:
            return torch.float32
        return torch.uint8 if self.state_dtype == "int8" else self.state_dtype

    def tensors(self, held: Sequence[str], group: Group) -> list[str]:
        """Names of the tensors that a parameter of the group holds, given those of the rule."""
        names = list(held)
        if group["rounding"] == "kahan":
            names.append("compensation")
        if self.average_name:
            names.append(self.average_name)
        return names

    def scalars(self, rule: Rule, held: Sequence[str]) -> list[Scalar]:
        """The numbers, 0-d and fp32, that it holds besides."""
        scalars = [_STEP, *(rule.scalars if held else ())]
        return [*scalars, _NUM_AVERAGED] if self.average_name else scalars


def check_state_shapes(owner: str, entries: Sequence[tuple[Entry, Group, Rule]], layout: StateLayout) -> None:
    """Raises ValueError if a state tensor has not the shape that goes with its parameter; nothing is changed before."""
    for entry, group, rule in entries:
        for name in _walked(entry, group, layout):
            held = entry.state.get(name)
            if held is not None and held.shape != rule.shape_of(name, entry.param):
                raise ValueError(
                    f"{owner}.step: the state {name!r} has shape {list(held.shape)}, but its parameter has shape "
                    f"{list(entry.param.shape)}."
                )


@torch.no_grad()
def prepare_state(entries: Sequence[tuple[Entry, Group, Rule]], layout: StateLayout) -> None:
    """Creates what a state lacks, as zeros, and puts what it has into the dtype and strides that the walk needs."""
    missing: list[tuple[State, str, Tensor, torch.dtype, float]] = []
    for entry, group, rule in entries:
        for name in _walked(entry, group, layout):
            held = entry.state.get(name)
            dtype = layout.dtype_of(name, entry.param, rule)
            has_scale = dtype != torch.uint8 or scale_name(name) in entry.state
            like = rule.like(name, entry.param)
            if held is None or not has_scale or not _fits(held, like, dtype):
                fresh = rule.fresh(name, group) if rule.fresh and name in rule.states else 0.0
                missing.append((entry.state, name, like, dtype, fresh))
    likes = [local(like) for _, _, like, _, _ in missing]
    created = zeros_like_all(likes, [dtype for _, _, _, dtype, _ in missing])
    for (state, name, like, _, fresh), tensor in zip(missing, created, strict=True):
        held = state.get(name)
        if held is not None:
            convert_(tensor, state, name, local(distribute_like(held, like)))
        elif fresh:
            parts = as_real(tensor)  # both parts of a complex number, as torch does
            convert_(parts, state, name, torch.full_like(parts, fresh, dtype=torch.float64))
        elif tensor.dtype == torch.uint8:
            state[scale_name(name)] = zero_scales(tensor)
        if held is None and name == layout.average_name:
            state.pop("num_averaged", None)  # it counted the updates of another average
        state[name] = place_like(tensor, like)
    _create_scalars(entries, layout)


def convert_(tensor: Tensor, state: State, name: str, held: Tensor) -> None:
    """Fills `tensor`, which will be `state[name]`, with what `held` says; scales of codes come and go in `state`."""
    scale = state.pop(scale_name(name), None)
    if tensor.dtype == held.dtype == torch.uint8 and scale is not None and held.stride() == tensor.stride():
        tensor.copy_(held)
        state[scale_name(name)] = scale.to(tensor.device, copy=True)
        return
    if held.dtype == torch.uint8 and scale is not None:
        held = decode(held.to(tensor.device), scale.to(tensor.device), signed=name not in NONNEGATIVE)
    if tensor.dtype != torch.uint8:
        tensor.copy_(held)
        return
    value = torch.empty_like(tensor, dtype=torch.float32).copy_(held)
    scales = zero_scales(tensor)
    encode_(tensor, scales, value, signed=name not in NONNEGATIVE, key=(0, 0, 0, 0))
    state[scale_name(name)] = scales


def _walked(entry: Entry, group: Group, layout: StateLayout) -> list[str]:
    """What the walk touches: a compensation that is there is used up even after `rounding` was changed."""
    names = layout.tensors(entry.held, group)
    return [*names, "compensation"] if "compensation" in entry.state and "compensation" not in names else names


def _fits(held: Tensor, like: Tensor, dtype: torch.dtype) -> bool:
    if isinstance(held, DTensor) != isinstance(like, DTensor):
        return False
    held, like = local(held), local(like)
    strides = torch.empty_like(like, device="meta").stride()
    return held.dtype == dtype and held.stride() == strides and held.device == like.device


def _create_scalars(entries: Sequence[tuple[Entry, Group, Rule]], layout: StateLayout) -> None:
    """Adds what is missing, as views of one tensor."""
    missing: list[tuple[Entry, Scalar]] = []
    for entry, _, rule in entries:
        for scalar in layout.scalars(rule, entry.held):
            held = entry.state.get(scalar.name)
            if held is None:
                missing.append((entry, scalar))
            elif held.dtype != torch.float32 or held.device != entry.param.device:
                entry.state[scalar.name] = held.detach().to(entry.param.device, torch.float32, copy=True)
    if not missing:
        return
    # On CUDA they live on the device: a skipped step must not advance them, and only the device knows of it.
    # fp32 is what the walk reads, whatever torch's default dtype is.
    fresh, device = [scalar.fresh for _, scalar in missing], missing[0][0].param.device
    values = torch.tensor(fresh, dtype=torch.float32, device=device)
    for (entry, scalar), value in zip(missing, values.unbind(), strict=True):
        entry.state[scalar.name] = value
