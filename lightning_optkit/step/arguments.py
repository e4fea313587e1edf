# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of an optimizer, before anything is built or changed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optkit._checks import (
    NO_LIST,
    check_bools,
    check_in,
    check_int,
    check_like,
    check_listed,
    check_one_of,
    check_tensor,
    shown,
)
from lightning_optkit.step.numbers import ROUNDINGS, starts_at_a_step
from lightning_optkit.step.plain import is_partial
from lightning_optkit.step.rule import Group
from lightning_optkit.step.split_weights import CORRECTIONS, LOW_ORDER_PARTS
from lightning_optkit.step.stages import OF_THE_OPTIMIZER

__all__ = [
    "base_rate",
    "check_betas",
    "check_flag",
    "check_group",
    "check_group_entries",
    "check_number",
    "check_params",
    "check_rounding",
    "check_stages",
    "checked_as",
    "listed",
    "pair",
    "several",
    "with_listed_params",
    "with_real_params",
]

_OUR_FLAGS = ("cautious", "caution", "decouple_lr", "centralize", "decoupled_weight_decay")
_TORCHS_FLAGS = ("amsgrad", "capturable", "differentiable", "foreach", "fused", "maximize", "nesterov")

_COUNTS = {2: "two numbers", 3: "three numbers"}
_PARAMS = "an iterable of parameters or of groups, such as model.parameters()"


def check_group(owner: str, group: Group, decay_flag: str) -> None:
    """Raises if an entry that every rule has is out of range.

    Args:
        owner: The optimizer.
        group: The group to check.
        decay_flag: The optimizer's name for `decoupled_weight_decay`.
    """
    for name in ("lr", "weight_decay"):
        check_number(owner, name, group[name], "[0, inf)")
    check_in(owner, "l1", group["l1"], "[0, inf)")
    for name in _OUR_FLAGS:
        check_bools(owner, **{decay_flag if name == "decoupled_weight_decay" else name: group[name]})
    _check_decay_lr(owner, group)
    for name in _TORCHS_FLAGS:
        if name in group and not (group[name] is None and name in ("foreach", "fused")):
            check_flag(owner, name, group[name])
    check_one_of(owner, "rounding", group["rounding"], ROUNDINGS)
    check_int(owner, "rounding_seed", group["rounding_seed"], minimum=0)
    if "average_decay" in group:
        check_number(owner, "average_decay", group["average_decay"], "[0, 1)")
    for name in ("foreach", "differentiable"):
        if group["fused"] and group[name]:
            raise RuntimeError(f"{owner}(fused=True, {name}=True): at most one of the two can be True.")
    if group["differentiable"]:
        raise ValueError(f"{owner}(differentiable=True): must be False; the step writes in place.")


def _check_decay_lr(owner: str, group: Group) -> None:
    if "decay_lr" in group:
        check_in(owner, "decay_lr", group["decay_lr"], "[0, inf)")
    if group["decouple_lr"] and not group["decoupled_weight_decay"]:
        raise ValueError(f"{owner}(decouple_lr=True): needs decoupled weight decay, such as that of AdamW.")
    if group["decouple_lr"] and not group.get("decay_lr", group["lr"]):
        raise ValueError(f"{owner}(decouple_lr=True): decay_lr, the lr that a group is added with, must not be 0.")


def base_rate(group: Group) -> Any:
    """The rate that a schedule multiplies, as a Python number; unchecked."""
    rate = group.get("initial_lr", group["lr"])
    return rate.item() if isinstance(rate, Tensor) and rate.numel() == 1 else rate


def check_group_entries(owner: str, group: Group, rounding: str) -> None:
    """Raises ValueError for entries of a new group that are no entries of a group, or that its parameters cannot have.

    Args:
        owner: The optimizer.
        group: The group as given, its parameters in a list or as one tensor.
        rounding: The rounding of the group.
    """
    for name in OF_THE_OPTIMIZER:
        if name in group:
            raise ValueError(
                f"{owner}(params=[{{{name!r}: ...}}]): {name} is of the whole optimizer; give it as an argument."
            )
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    for param in [member[1] if isinstance(member, tuple) else member for member in params]:
        check_rounding(owner, rounding, param)


def check_rounding(owner: str, rounding: str, param: Tensor) -> None:
    """Raises ValueError if a parameter cannot be split as the rounding asks for."""
    if param.dtype == torch.float16 and LOW_ORDER_PARTS.get(rounding) in CORRECTIONS:
        raise ValueError(
            f"{owner}(rounding={rounding!r}): a parameter of shape {list(param.shape)} is float16; weights that are "
            "split must be bfloat16, and 'kahan' serves both."
        )


def check_number(owner: str, name: str, value: object, interval: str) -> None:
    """Raises unless `value` is a number, or a 1-element tensor, in `interval`."""
    if isinstance(value, Tensor):
        check_tensor(owner, name, value, "real", meta=False)
        if value.numel() != 1:
            raise ValueError(f"{owner}({name}={list(value.shape)} tensor): {name} must have one element.")
        value = value.item()
    check_in(owner, name, value, interval)  # type: ignore[arg-type]


def check_flag(owner: str, name: str, value: object) -> None:
    """Raises TypeError unless `value` is True or False, or a number equal to one of them, as torch accepts."""
    is_one = not isinstance(value, Tensor) and getattr(value, "shape", ()) == ()  # the truth of an array is undefined
    if not is_one or value not in (False, True):
        raise TypeError(f"{owner}({name}={shown(value)}): {name} must be True or False.")


@contextmanager
def checked_as(owner: str, action: str) -> Iterator[None]:
    """Renames the owner in errors raised by the constructor's checks.

    Args:
        owner: The name that the checks use.
        action: The name to show instead, e.g. "AdamW.step".
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        said = " ".join(str(error).split())  # torch prints a tensor of several rows on several lines
        is_ours = said.startswith(f"{owner}(")
        kind = type(error) if is_ours or isinstance(error, TypeError) else ValueError
        raise kind(f"{action}{said.removeprefix(owner)}" if is_ours else f"{action}: {said}") from None


def pair(owner: str, name: str, value: Any) -> tuple[Any, Any]:
    """`value` as two numbers, which are not checked yet.

    Raises:
        TypeError: if it is not a sequence.
        ValueError: if it has another length.
    """
    first, second = several(owner, name, value, 2)
    return first, second


def check_betas(owner: str, betas: Any) -> None:
    """Raises unless `betas` are two decay rates in [0, 1)."""
    for place, beta in enumerate(pair(owner, "betas", betas)):
        check_number(owner, f"betas[{place}]", beta, "[0, 1)")


def several(owner: str, name: str, value: Any, count: int) -> tuple[Any, ...]:
    """`value` as `count` numbers, which are not checked yet. Raises like `pair`."""
    requirement = f"{name} must be {_COUNTS[count]}"
    is_array = hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1
    if isinstance(value, NO_LIST) or not (is_array or isinstance(value, Sequence)):
        raise TypeError(f"{owner}({name}={shown(value)}): {requirement}.")
    if len(value) != count:
        raise ValueError(f"{owner}({name}={shown(value)}): {requirement}.")
    return tuple(value)


def check_stages(owner: str, clip: object, average: Any, statistics: object) -> None:
    """Raises TypeError for an invalid stage, ValueError for an average that starts at an epoch or a fraction."""
    if clip is not None:
        check_like(owner, "clip", clip, ("norm_bound", "bounds"), "None or a clip such as ClipNorm(1.0)")
    if average is not None:
        check_like(owner, "average", average, ("state_name", "start"), "None or an average such as EMA(0.999)")
    if average is not None and not hasattr(average, "kind"):
        raise TypeError(f"{owner}(average={shown(average)}): no step keeps it; use WeightAveraging or update_average_.")
    if average is not None and not starts_at_a_step(average):
        call = f"{owner}(average={shown(average)})"
        raise ValueError(f"{call}: start must be an optimizer step; give average.for_run(total_steps).")
    check_bools(owner, statistics=statistics)


def listed(owner: str, params: ParamsT) -> list[Any]:
    """`params`, and those of each group, as lists, so that an empty one is found before anything is built."""
    if isinstance(params, Tensor):
        raise TypeError(f"{owner}(params=<Tensor>): params must be {_PARAMS}.")
    as_list = check_listed(owner, "params", params, _PARAMS, member=" parameter")
    if any(isinstance(one, dict) for one in as_list):
        return [with_listed_params(owner, "params", one) for one in as_list]
    _check_tensors(owner, "params", as_list)
    return as_list


def with_listed_params(owner: str, name: str, group: Group) -> Group:
    """The group with its parameters in a list, so that inspecting them does not exhaust an iterator.

    Args:
        owner: The owner of the argument.
        name: The argument that the group is, or is part of.
        group: The group to check.

    Raises:
        TypeError: if it is not a group, or its parameters are not parameters.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(
            f"{owner}({name}={shown(group)}): {name} must be groups, each a dict such as "
            '{"params": model.parameters(), "lr": 0.1}.'
        )
    given = group["params"]
    if isinstance(given, Tensor | set):
        return group
    as_list = check_listed(owner, f"{name}['params']", given, _PARAMS, empty=True)
    _check_tensors(owner, f"{name}['params']", as_list)
    return {**group, "params": as_list}


def _check_tensors(owner: str, name: str, members: list[Any]) -> None:
    """Raises TypeError unless each is a tensor, or a pair of a name and a tensor."""
    for member in members:
        is_named = isinstance(member, tuple) and len(member) == 2 and isinstance(member[0], str)
        if not isinstance(member[1] if is_named else member, Tensor):
            raise TypeError(f"{owner}({name}=[..., {shown(member)}]): {name} must be {_PARAMS}.")


def check_params(owner: str, groups: list[Group], params: Any) -> None:
    """Raises if a parameter is given twice, or is on another device than the existing ones."""
    new = [p[1] if isinstance(p, tuple) else p for p in ([params] if isinstance(params, Tensor) else params)]
    known = [p for group in groups for p in group["params"]]
    tensors = [p for p in [*known, *new] if isinstance(p, Tensor)]
    if len({id(p) for p in tensors}) != len(tensors):
        raise ValueError(f"{owner}(params=...): a parameter is given twice; each belongs to one group, once.")
    if any(is_partial(p) for p in tensors):
        raise ValueError(
            f"{owner}(params=...): a parameter is a sum over processes (Partial); all must be sharded or replicated."
        )
    devices = sorted({str(p.device) for p in tensors} - {"meta"})
    if len(devices) > 1:
        raise ValueError(f"{owner}(params=...): all parameters must be on one device, got {devices}.")


def with_real_params(owner: str, param_group: dict[str, Any]) -> dict[str, Any]:
    """`with_listed_params` of an `add_param_group`, for a rule that has no complex arithmetic.

    Raises:
        ValueError: for a complex parameter.
    """
    param_group = with_listed_params(f"{owner}.add_param_group", "param_group", param_group)
    given = param_group["params"]
    members = [m[1] if isinstance(m, tuple) else m for m in ([given] if isinstance(given, Tensor) else given)]
    if any(isinstance(member, Tensor) and member.is_complex() for member in members):
        raise ValueError(f"{owner}(params=...): every parameter must be real, not complex.")
    return param_group
