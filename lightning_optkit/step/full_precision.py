# SPDX-License-Identifier: Apache-2.0
"""State dicts of a model with its weights in fp32, including the low-order parts that the optimizer stores."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_mapping, check_module
from lightning_optkit.step.rule import State
from lightning_optkit.step.shards import distribute_like, local, place_like
from lightning_optkit.step.split_weights import CORRECTIONS, correction_of, join, split_
from lightning_optkit.step.stepped import Loadable

__all__ = ["full_precision_state_dict", "load_full_precision"]


def full_precision_state_dict(optimizer: Loadable, model: nn.Module) -> dict[str, Any]:
    """`model.state_dict()` with the optimizer's 16-bit parameters in fp32, including their low-order parts."""
    check_module(f"{optimizer._owner}.full_precision_state_dict", "model", model)
    state_dict = dict(model.state_dict())
    for name, param in _stepped(optimizer, model).items():
        if name in state_dict:
            state_dict[name] = place_like(_whole(local(param.detach()), optimizer.state.get(param, {})), param)
    return state_dict


def _whole(param: Tensor, state: State) -> Tensor:
    correction = correction_of(state)
    if correction is not None:
        return join(param, local(correction))
    lost = state.get("compensation")
    value = param.to(torch.float32)
    return value if lost is None else value + local(lost).to(torch.float32)


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
        kept = {"split24": "correction8", "split32": "correction16"}.get(groups[param]["rounding"])
        if name not in state_dict or kept is None or param.dtype != torch.bfloat16:
            continue
        value = local(distribute_like(state_dict[name].detach().to(param.device, torch.float32), param))
        here = local(param.detach())
        correction = torch.empty_like(here, dtype=CORRECTIONS[kept])
        split_(here, correction, value)
        optimizer.state[param][kept] = place_like(correction, param)
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
