# SPDX-License-Identifier: Apache-2.0
"""The tensors in `optimizer.state`, with their dtypes and layouts."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optkit.step.average import Average
from lightning_optkit.step.gathering import gathered, scatter_
from lightning_optkit.step.gradient_reference import as_real
from lightning_optkit.step.memory import Arena, zeros_like_all
from lightning_optkit.step.numbers import compute_dtype
from lightning_optkit.step.plain import has_dispatch, why_unusable
from lightning_optkit.step.quantized_state import BLOCK, dequantize8, quantize8_, scale_name, zero_scales
from lightning_optkit.step.rule import Group, Rule, Scalar, State, StateSpec
from lightning_optkit.step.segments import Entry
from lightning_optkit.step.shards import distribute_like, local, place_like
from lightning_optkit.step.split_weights import (
    CORRECTIONS,
    LOW_ORDER_PARTS,
    low_order_part,
    part_kept,
    split_off,
    whole,
)

__all__ = ["Kept", "StateLayout", "check_state", "fill_", "prepare_state"]

_STEP, _NUM_AVERAGED = Scalar("step", 0.0, 1.0), Scalar("num_averaged", 0.0, 1.0)


@dataclass(frozen=True)
class StateLayout:
    """The dtype of each state tensor.

    Args:
        average: The average that the step keeps, if any.
        state_dtype: Dtype of the rule's state for real parameters of at most 32 bits; "int8": codes of
            `lightning_optkit.step.quantized_state`, as uint8.
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
        if name in CORRECTIONS:
            return CORRECTIONS[name]
        if compute_dtype(param) == torch.float64:
            return torch.complex128 if param.dtype.is_complex else torch.float64
        if param.dtype.is_complex:
            return torch.complex64
        if self.average is not None and name == self.average.state_name:
            return self.average.dtype
        if rule.spec(name).full_precision:
            return torch.float32
        return torch.uint8 if self.state_dtype == "int8" else self.state_dtype

    def tensors(self, state_names: Sequence[str], group: Group, param: Tensor) -> list[str]:
        """Names of the state tensors of a parameter in the group, given those of the rule."""
        names = list(state_names)
        part = part_kept(group["rounding"], param)
        if part is not None:
            names.append(part)
        if self.average_name:
            names.append(self.average_name)
        return names

    def scalars(self, rule: Rule, state_names: Sequence[str]) -> list[Scalar]:
        """The 0-d fp32 tensors in the state."""
        scalars = [_STEP, *(rule.scalars if state_names else ())]
        return [*scalars, _NUM_AVERAGED] if self.average_name else scalars


class Kept(NamedTuple):
    """An entry with its state, its group and its rule."""

    entry: Entry
    state: State
    group: Group
    rule: Rule


def check_state(owner: str, kept: Sequence[Kept], layout: StateLayout) -> None:
    """Raises ValueError if a state cannot belong to its parameter; nothing is changed before."""
    for entry, state, group, rule in kept:
        walked = layout.tensors(entry.state_names, group, entry.param)
        for name in [*walked, *(part for part in LOW_ORDER_PARTS.values() if part not in walked)]:
            held = state.get(name)
            if held is not None:
                _check_tensor(f"{owner}.step", name, held, entry.param, rule)
                _check_scales(f"{owner}.step", name, held, state.get(scale_name(name)))
        for scalar in layout.scalars(rule, entry.state_names):
            value = state.get(scalar.name)
            if value is not None and not _is_number(value):
                raise ValueError(f"{owner}.step: the state {scalar.name!r} must be one number, got {_kind_of(value)}.")


def _check_tensor(owner: str, name: str, held: object, param: Tensor, rule: Rule) -> None:
    if not isinstance(held, Tensor):
        raise ValueError(f"{owner}: the state {name!r} must be a tensor, got {_kind_of(held)}.")
    if held.shape != rule.shape_of(name, param):
        raise ValueError(
            f"{owner}: the state {name!r} has shape {list(held.shape)}, but its parameter has shape "
            f"{list(param.shape)}."
        )
    reason = why_unusable(held)
    if reason is not None:
        raise ValueError(f"{owner}: the state {name!r} {reason}.")
    if held.layout != torch.strided or (held.is_complex() and not param.is_complex()):
        raise ValueError(f"{owner}: the state {name!r} must be dense and of the kind of its parameter.")
    if name in CORRECTIONS and held.dtype != CORRECTIONS[name]:
        raise ValueError(f"{owner}: the state {name!r} must be {CORRECTIONS[name]}, got {held.dtype}.")


def _check_scales(owner: str, name: str, held: Tensor, scales: object) -> None:
    if held.dtype != torch.uint8 or scales is None:
        return
    blocks = -(-held.numel() // BLOCK)
    if not isinstance(scales, Tensor) or scales.shape != (blocks,) or why_unusable(scales) is not None:
        raise ValueError(f"{owner}: the state {scale_name(name)!r} must have shape [{blocks}], got {_kind_of(scales)}.")


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.layout == torch.strided and why_unusable(value) is None
    return isinstance(value, Real)


def _kind_of(value: object) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


@torch.no_grad()
def prepare_state(kept: Sequence[Kept], layout: StateLayout, arena: Arena | None = None) -> None:
    """Creates missing state, in `arena` if there is room, and converts existing state to the form of the walk."""
    for entry, state, group, _ in kept:
        _change_low_order_part(entry.param, state, group)
    missing: list[tuple[State, StateSpec, Tensor, torch.dtype, float]] = []
    for entry, state, group, rule in kept:
        for name in layout.tensors(entry.state_names, group, entry.param):
            held = state.get(name)
            dtype = layout.dtype_of(name, entry.param, rule)
            like = rule.like(name, entry.param)
            if held is None or not _fits(held, like, dtype) or not _has_fitting_scales(held, name, state):
                spec = rule.spec(name)
                missing.append((state, spec, like, dtype, spec.fresh(group) if spec.fresh else 0.0))
    likes = [local(like) for _, _, like, _, _ in missing]
    created = zeros_like_all(likes, [dtype for _, _, _, dtype, _ in missing], arena)
    for (state, spec, like, _, fresh), tensor in zip(missing, created, strict=True):
        name = spec.name
        held = state.get(name)
        if held is not None:
            fill_(tensor, like, state, spec, held)
        elif fresh and tensor.dtype == torch.uint8:
            fill_(tensor, like, state, spec, torch.full(like.shape, fresh, dtype=torch.float64, device=like.device))
        elif fresh:
            parts = as_real(tensor)  # both parts of a complex number, as in torch
            _convert_(parts, state, spec, torch.full_like(parts, fresh, dtype=torch.float64))
        elif tensor.dtype == torch.uint8:
            state[scale_name(name)] = zero_scales(like)
        if held is None and name == layout.average_name:
            state.pop("num_averaged", None)  # it counted updates of another average
        state[name] = place_like(tensor, like)
    _create_scalars(kept, layout)


def fill_(tensor: Tensor, like: Tensor, state: State, spec: StateSpec, held: Tensor) -> None:
    """`_convert_` for `tensor`, the local part of state that is placed like `like`; `held` may be placed otherwise.

    8-bit state of a sharded parameter has the blocks and the scales of the whole tensor, in every process: its codes
    alone are sharded, and any number of processes can go on from a checkpoint.
    """
    if not isinstance(like, DTensor) or torch.uint8 not in (tensor.dtype, held.dtype):
        _convert_(tensor, state, spec, local(distribute_like(held, like)))
        return
    whole = gathered([local(held)], [held])[0] if isinstance(held, DTensor) else held.to(like.device)
    made = whole.new_empty(like.shape, dtype=tensor.dtype)
    _convert_(made, state, spec, whole)
    scatter_(tensor, made, like)


def _convert_(tensor: Tensor, state: State, spec: StateSpec, held: Tensor) -> None:
    """Fills `tensor`, the new state of `spec`, with the values of `held`; adds or removes its scales in `state`."""
    name = spec.name
    scale = state.pop(scale_name(name), None)
    if tensor.dtype == held.dtype == torch.uint8 and scale is not None and held.stride() == tensor.stride():
        tensor.copy_(held)
        state[scale_name(name)] = scale.detach().to(tensor.device, torch.float32, copy=True).contiguous()
        return
    if held.dtype == torch.uint8 and scale is not None:
        held = dequantize8(held.to(tensor.device), scale.to(tensor.device), signed=not spec.nonnegative)
    if tensor.dtype != torch.uint8:
        tensor.copy_(held)
        return
    value = torch.empty_like(tensor, dtype=torch.float32).copy_(held)
    scales = zero_scales(tensor)
    quantize8_(tensor, scales, value, signed=not spec.nonnegative, key=None)
    state[scale_name(name)] = scales


def _change_low_order_part(param: Tensor, state: State, group: Group) -> None:
    """Converts the low-order part of a parameter when `rounding` changes, as exactly as the new one can hold it.

    Without a place for it, or after a cast of the parameter, it is dropped: later it would be added to another weight.
    """
    wanted, part = part_kept(group["rounding"], param), low_order_part(state)
    if part is None or wanted in state:
        return
    for name in LOW_ORDER_PARTS.values():
        state.pop(name, None)
    if wanted is not None:
        here = local(param.detach())
        state[wanted] = place_like(split_off(here, wanted, whole(here, local(part))), param)


def _fits(held: Tensor, like: Tensor, dtype: torch.dtype) -> bool:
    if isinstance(held, DTensor) != isinstance(like, DTensor):
        return False
    held, like = local(held), local(like)
    if held.is_neg() or has_dispatch(held) != has_dispatch(like):
        return False
    strides = torch.empty_like(like, device="meta").stride()
    return held.dtype == dtype and held.stride() == strides and held.device == like.device


def _has_fitting_scales(held: Tensor, name: str, state: State) -> bool:
    if held.dtype != torch.uint8:
        return True
    scales = state.get(scale_name(name))
    return (
        scales is not None and _is_plain_fp32(scales) and scales.is_contiguous() and scales.device == local(held).device
    )


def _is_plain_fp32(t: Tensor) -> bool:
    return t.dtype == torch.float32 and not has_dispatch(t) and not t.is_neg()


def _create_scalars(kept: Sequence[Kept], layout: StateLayout) -> None:
    """Adds missing scalars, as views of one tensor."""
    missing: list[tuple[State, Scalar]] = []
    for entry, state, _, rule in kept:
        for scalar in layout.scalars(rule, entry.state_names):
            held = state.get(scalar.name)
            if held is None:
                missing.append((state, scalar))
            elif not isinstance(held, Tensor) or not _is_plain_fp32(held) or held.device != entry.param.device:
                held = torch.as_tensor(held).detach().to(entry.param.device, torch.float32, copy=True)
                state[scalar.name] = held.reshape(())
    if not missing:
        return
    # On CUDA they are on the device, since a skipped step must not advance them and only the device knows of it. The
    # walk reads fp32, whatever torch's default dtype.
    fresh, device = [scalar.fresh for _, scalar in missing], kept[0].entry.param.device
    values = torch.tensor(fresh, dtype=torch.float32, device=device)
    for (state, scalar), value in zip(missing, values.unbind(), strict=True):
        state[scalar.name] = value
