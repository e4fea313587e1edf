# SPDX-License-Identifier: Apache-2.0
"""State dicts of a model with its weights in fp32, including the low-order parts that the optimizer stores."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_mapping, check_module
from lightning_optkit.step.plain import why_unusable
from lightning_optkit.step.rule import Group
from lightning_optkit.step.shards import distribute_like, local, place_like
from lightning_optkit.step.split_weights import (
    CORRECTIONS,
    LOW_ORDER_PARTS,
    part_kept,
    split_off,
    whole,
)
from lightning_optkit.step.stepped import Loadable

__all__ = ["full_precision", "full_precision_state_dict", "load_full_precision"]


def full_precision_state_dict(
    owner: str, groups: Sequence[Group], model: nn.Module, value_of: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """`model.state_dict()` with the 16-bit parameters of `groups` in fp32, including their low-order parts.

    Args:
        owner: Name of the caller in error messages.
        groups: Parameter groups of an optimizer.
        model: The model with these parameters.
        value_of: The local part of a parameter in fp32.

    Raises:
        ValueError: if the model has none of the parameters, the state dict has no entry of that name, or the state of a
            parameter is damaged.
    """
    check_module(owner, "model", model)
    state_dict = dict(model.state_dict())
    values: dict[Tensor, Tensor] = {}
    stepped = _stepped(groups, model)
    _check_trained(owner, model, stepped, groups)
    for name, param in stepped.items():
        if name not in state_dict:
            raise ValueError(
                f"{owner}(model=<{type(model).__name__}>): its state_dict has no {name!r}; leave its names as they are."
            )
        if param not in values:  # tied weights stay one tensor
            values[param] = place_like(value_of(param), param)
        state_dict[name] = values[param]
    return state_dict


def full_precision(owner: str, value: Tensor, state: Mapping[str, Any]) -> Tensor:
    """The local part of `value`, with the low-order part in `state`, in fp32.

    Raises:
        ValueError: if the low-order part does not fit.
    """
    name, value = next((name for name in LOW_ORDER_PARTS.values() if name in state), None), local(value.detach())
    if name is None:
        return value.to(torch.float32)
    part = state[name]
    is_whole = isinstance(part, Tensor) and why_unusable(part) is None and local(part).shape == value.shape
    if not is_whole or part.dtype != CORRECTIONS.get(name, part.dtype):
        raise ValueError(
            f"{owner}: the state {name!r} of a parameter of shape {list(value.shape)} must have its shape and the "
            "dtype that its name says."
        )
    if value.dtype != torch.bfloat16 and name in CORRECTIONS:
        return value.to(torch.float32)  # cast since the last step
    return whole(value, local(part))


def load_full_precision(optimizer: Loadable, model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Loads the result of `full_precision_state_dict`; nothing is changed if it does not fit the model.

    Raises:
        TypeError: if it is not a dict.
        ValueError: for a model that has none of the parameters, missing or unknown names, other shapes, kinds of
            numbers or layouts, and while the parameters hold an average.
    """
    owner = f"{optimizer._owner}.load_full_precision_state_dict"
    check_module(owner, "model", model)
    _check_fits(
        owner,
        model.state_dict(),
        check_mapping(owner, "state_dict", state_dict, "tensors by name, such as model.state_dict()"),
    )
    stepped = _stepped(optimizer.param_groups, model)
    _check_trained(owner, model, stepped, optimizer.param_groups)
    if optimizer._shown or any(
        carried in optimizer.state.get(p, {}) for p in stepped.values() for carried in optimizer._carried
    ):
        raise ValueError(f"{owner}: the parameters hold an average now; load while they hold the trained weights.")
    model.load_state_dict(state_dict)
    groups, drops = {param: group for group in optimizer.param_groups for param in group["params"]}, False
    for name, param in stepped.items():
        kept = part_kept(groups[param]["rounding"], param)
        value = local(distribute_like(state_dict[name].detach().to(param.device, torch.float32), param))
        if kept is not None:
            optimizer.state[param][kept] = place_like(split_off(local(param.detach()), kept, value), param)
        else:
            drops = drops or not torch.equal(local(param.detach()).to(torch.float32), value)
    optimizer._forget_steps()
    if drops:
        warnings.warn(
            f"{owner}: the low bits of the weights were dropped, as the rounding of their group keeps none; give "
            "rounding='split32' to keep them.",
            stacklevel=4,
        )


def _check_trained(owner: str, model: nn.Module, stepped: Mapping[str, Tensor], groups: Sequence[Group]) -> None:
    if not stepped and any(_is_narrow(param) for group in groups for param in group["params"]):
        raise ValueError(
            f"{owner}(model=<{type(model).__name__}>): it has none of the optimizer's 16-bit parameters; give the "
            "model that was trained, not a copy."
        )
    mine = {id(param) for group in groups for param in group["params"]}
    if mine.isdisjoint(id(param) for param in model.parameters()):
        raise ValueError(
            f"{owner}(model=<{type(model).__name__}>): it has none of the optimizer's parameters; give the model that "
            "was trained, not a copy."
        )


def _check_fits(owner: str, own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
    """Checks every entry; `Module.load_state_dict` would raise only after it has copied matching entries."""
    odd = sorted(own.keys() ^ state_dict.keys())
    if odd:
        reason = "is missing" if odd[0] in own else "is not in the model"
        raise ValueError(f"{owner}(state_dict=...): {odd[0]} {reason}.")
    for name, value in own.items():
        if isinstance(value, Tensor):
            why_not = _why_not(state_dict[name], value)
            if why_not is not None:
                raise ValueError(f"{owner}(state_dict=...): {name} {why_not}.")


def _why_not(given: object, value: Tensor) -> str | None:
    """Why `given` cannot be loaded into `value`, or None."""
    if not isinstance(given, Tensor) or given.shape != value.shape:
        shape = f"shape {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        return f"must have shape {list(value.shape)}, got {shape}"
    reason = why_unusable(given)
    if reason is not None:
        return reason
    if given.layout != value.layout or given.is_quantized != value.is_quantized:
        return "must be a dense tensor"
    if given.is_complex() != value.is_complex() or given.is_floating_point() != value.is_floating_point():
        return f"must hold numbers like {value.dtype}, got {given.dtype}"
    return None


def _stepped(groups: Sequence[Group], model: nn.Module) -> dict[str, Tensor]:
    """The 16-bit parameters of the model in these groups, by all of their names."""
    mine = {id(param) for group in groups for param in group["params"]}
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if id(p) in mine and _is_narrow(p)}


def _is_narrow(param: Tensor) -> bool:
    return param.dtype in (torch.bfloat16, torch.float16)
