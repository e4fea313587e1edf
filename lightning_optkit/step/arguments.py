# SPDX-License-Identifier: Apache-2.0
"""Checks of what a user hands to an optimizer, before anything is built or changed."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optkit._checks import check_in, check_one_of
from lightning_optkit.step.numbers import ROUNDINGS
from lightning_optkit.step.rule import Group

__all__ = ["check_group", "check_params", "listed", "with_listed_params"]


def check_group(owner: str, group: Group) -> None:
    """Raises for an entry, of those that every rule has, that is out of range."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"{owner}(lr={list(lr.shape)} tensor): lr must be a number or a 1-element tensor.")
    check_in(owner, "lr", float(lr), "[0, inf)")
    check_in(owner, "weight_decay", float(group["weight_decay"]), "[0, inf)")
    check_in(owner, "l1", group["l1"], "[0, inf)")
    check_one_of(owner, "cautious", group["cautious"], (False, True))
    check_one_of(owner, "rounding", group["rounding"], ROUNDINGS)
    if group["differentiable"]:
        raise ValueError(f"{owner}(differentiable=True): must be False; the step writes in place.")
    if group["fused"] and group["foreach"]:
        raise RuntimeError(f"{owner}(fused=True, foreach=True): at most one of the two can be True.")


def listed(owner: str, params: ParamsT) -> list[Any]:
    """`params` as a list, so that an empty one is found before anything is built."""
    if isinstance(params, Tensor):
        raise TypeError(f"{owner}(params=<Tensor>): params must be an iterable of parameters or of groups.")
    as_list = list(params)
    if not as_list:
        raise ValueError(f"{owner}(params=[]): params must hold at least one parameter.")
    return as_list


def with_listed_params(group: Group) -> Group:
    """The group with its parameters in a list, so that looking at them does not use up an iterator."""
    given = group["params"]
    return group if isinstance(given, Tensor | set) else {**group, "params": list(given)}


def check_params(owner: str, groups: list[Group], params: Any) -> None:
    """Raises if a parameter is given twice, or on another device than those already there."""
    new = [p[1] if isinstance(p, tuple) else p for p in ([params] if isinstance(params, Tensor) else params)]
    known = [p for group in groups for p in group["params"]]
    tensors = [p for p in [*known, *new] if isinstance(p, Tensor)]
    if len({id(p) for p in tensors}) != len(tensors):
        raise ValueError(f"{owner}(params=...): a parameter is given twice; each belongs to one group, once.")
    devices = sorted({str(p.device) for p in tensors} - {"meta"})
    if len(devices) > 1:
        raise ValueError(f"{owner}(params=...): all parameters must be on one device, got {devices}.")
