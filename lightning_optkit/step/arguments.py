# SPDX-License-Identifier: Apache-2.0
"""Checks of what a user hands to an optimizer, before anything is built or changed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optkit._checks import check_in, check_int, check_one_of
from lightning_optkit.step.numbers import ROUNDINGS
from lightning_optkit.step.rule import Group

__all__ = [
    "check_flag",
    "check_group",
    "check_number",
    "check_params",
    "check_stages",
    "checked_as",
    "listed",
    "pair",
    "with_listed_params",
]


def check_group(owner: str, group: Group) -> None:
    """Raises for an entry, of those that every rule has, that is out of range."""
    for name in ("lr", "weight_decay"):
        check_number(owner, name, group[name], "[0, inf)")
    check_in(owner, "l1", group["l1"], "[0, inf)")
    check_one_of(owner, "cautious", group["cautious"], (False, True))
    check_one_of(owner, "centralize", group["centralize"], (False, True))
    check_one_of(owner, "rounding", group["rounding"], ROUNDINGS)
    check_int(owner, "rounding_seed", group["rounding_seed"], minimum=0)
    if "average_decay" in group:
        check_number(owner, "average_decay", group["average_decay"], "[0, 1)")
    check_flag(owner, "maximize", group["maximize"])
    for name in ("fused", "foreach", "capturable", "differentiable"):
        if group.get(name) is not None:
            check_flag(owner, name, group[name])
    for name in ("foreach", "differentiable"):
        if group["fused"] and group[name]:
            raise RuntimeError(f"{owner}(fused=True, {name}=True): at most one of the two can be True.")
    if group["differentiable"]:
        raise ValueError(f"{owner}(differentiable=True): must be False; the step writes in place.")


def check_number(owner: str, name: str, value: object, interval: str) -> None:
    """Raises unless `value` is a number, or a 1-element tensor, in `interval`."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{owner}({name}={list(value.shape)} tensor): {name} must have one element.")
        value = value.item()
    check_in(owner, name, value, interval)  # type: ignore[arg-type]


def check_flag(owner: str, name: str, value: object) -> None:
    """Raises TypeError unless `value` is True or False, or a number that says so as it does to torch."""
    is_one = not isinstance(value, Tensor) and getattr(value, "shape", ()) == ()  # an array has no truth of its own
    if not is_one or value not in (False, True):
        raise TypeError(f"{owner}({name}={value!r}): {name} must be True or False.")


@contextmanager
def checked_as(owner: str, action: str) -> Iterator[None]:
    """Lets refusals in the words of the constructor of `owner` name what was asked of it instead.

    Args:
        owner: As the checks are given it.
        action: In its place, "AdamW.step".
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        said = " ".join(str(error).split())  # a tensor of several rows is printed on several lines
        is_ours = said.startswith(f"{owner}(")
        kind = type(error) if is_ours or isinstance(error, TypeError) else ValueError
        raise kind(f"{action}{said.removeprefix(owner)}" if is_ours else f"{action}: {said}") from None


def pair(owner: str, name: str, value: Any) -> tuple[Any, Any]:
    """`value` as two numbers.

    Raises:
        TypeError: if it is no sequence.
        ValueError: if it has another length.
    """
    if len(value) != 2:
        raise ValueError(f"{owner}({name}={value!r}): {name} must be two numbers.")
    first, second = value
    return first, second


def check_stages(owner: str, clip: object, average: Any, statistics: object) -> None:
    """Raises TypeError for a stage that is none, ValueError for an average whose start is not a step yet."""
    if clip is not None and not hasattr(clip, "norm_bound"):
        raise TypeError(f"{owner}(clip={clip!r}): clip must be None or a clip such as ClipNorm(1.0).")
    if average is not None and not hasattr(average, "state_name"):
        raise TypeError(f"{owner}(average={average!r}): average must be None or an average such as EMA(0.999).")
    if average is not None and not hasattr(average, "kind"):
        raise TypeError(f"{owner}(average={average!r}): no step keeps it; use WeightAveraging or update_average_.")
    if average is not None and isinstance(average.start, float):
        raise ValueError(f"{owner}(average={average!r}): start must be an optimizer step; see SWA.for_run.")
    if not isinstance(statistics, bool):
        raise TypeError(f"{owner}(statistics={statistics!r}): statistics must be True or False.")


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
