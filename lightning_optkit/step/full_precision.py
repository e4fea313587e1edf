# SPDX-License-Identifier: Apache-2.0
"""State dicts of a model with its weights in fp32, including the low-order parts that the optimizer stores."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_mapping, check_module
from lightning_optkit.step.shards import distribute_like, local, place_like
from lightning_optkit.step.split_weights import CORRECTIONS, LOW_ORDER_PARTS, low_order_part, split_off, whole
from lightning_optkit.step.stepped import Loadable

__all__ = ["full_precision_state_dict", "load_full_precision"]


def full_precision_state_dict(optimizer: Loadable, model: nn.Module) -> dict[str, Any]:
    """`model.state_dict()` with the optimizer's 16-bit parameters in fp32, including their low-order parts."""
    check_module(f"{optimizer._owner}.full_precision_state_dict", "model", model)
    state_dict = dict(model.state_dict())
    for name, param in _stepped(optimizer, model).items():
        if name in state_dict:
            state_dict[name] = place_like(whole(local(param.detach()), _part_of(optimizer, param)), param)
    return state_dict


def _part_of(optimizer: Loadable, param: Tensor) -> Tensor | None:
    """The low-order part of the value that the parameter now holds."""
    state = optimizer.state.get(param, {})
    part = low_order_part(state)
    # In evaluation mode a schedule-free rule carries the point that it steps, to which the part belongs.
    return None if part is None or any(name in state for name in optimizer._carried) else local(part)


def load_full_precision(optimizer: Loadable, model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Loads the result of `full_precision_state_dict`; nothing is changed if it does not fit the model.

    Raises:
        TypeError: if it is not a dict.
        ValueError: for missing or unknown names, and other shapes.
    """
    owner = f"{optimizer._owner}.load_full_precision_state_dict"
    check_module(owner, "model", model)
    _check_fits(
        owner,
        model.state_dict(),
        check_mapping(owner, "state_dict", state_dict, "tensors by name, such as model.state_dict()"),
    )
    stepped = _stepped(optimizer, model)
    model.load_state_dict(state_dict)
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    for name, param in stepped.items():
        kept = LOW_ORDER_PARTS.get(groups[param]["rounding"])
        state = optimizer.state[param]
        is_elsewhere = any(carried in state for carried in optimizer._carried)
        if kept is None or is_elsewhere or (kept in CORRECTIONS and param.dtype != torch.bfloat16):
            continue
        value = local(distribute_like(state_dict[name].detach().to(param.device, torch.float32), param))
        state[kept] = place_like(split_off(local(param.detach()), kept, value), param)
    optimizer._forget_steps()


def _check_fits(owner: str, own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
    """Checks names and shapes; `Module.load_state_dict` would raise only after it has copied matching entries."""
    odd = sorted(own.keys() ^ state_dict.keys())
    if odd:
        reason = "is missing" if odd[0] in own else "is not in the model"
        raise ValueError(f"{owner}(state_dict=...): {odd[0]} {reason}.")
    for name, value in own.items():
        given = state_dict[name]
        if not isinstance(value, Tensor):
            continue
        if not isinstance(given, Tensor) or given.shape != value.shape:
            shape = f"shape {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise ValueError(f"{owner}(state_dict=...): {name} must have shape {list(value.shape)}, got {shape}.")


def _stepped(optimizer: Loadable, model: nn.Module) -> dict[str, Tensor]:
    """The 16-bit parameters of the model that the optimizer steps, by all of their names."""
    mine = {id(param) for group in optimizer.param_groups for param in group["params"]}
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if id(p) in mine and p.dtype in (torch.bfloat16, torch.float16)}
