# SPDX-License-Identifier: Apache-2.0
"""Splits the groups of an existing optimizer in place, so that its schedulers keep their reference."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optkit._torch_private import LAST_LRS, schedulers_within
from lightning_optkit.optimizers._group_rules import GroupRules, Membership, gathered, named_apart
from lightning_optkit.optimizers.groups import GroupTable

__all__ = ["regroup_"]

_RATES = ("lr", "initial_lr", "decay_lr", "max_lr", "min_lr")  # the last two belong to OneCycleLR
_SCALED, _COPIED = ("base_lrs", LAST_LRS, "max_lrs"), ("lr_lambdas", "min_lrs", "base_momentums", "max_momentums")
_STRANGER = Membership(decays=True, depth=None, scale=1.0, entries=(), label="other")


@torch.no_grad()
def regroup_(
    optimizer: Optimizer, model: nn.Module, rules: GroupRules, schedulers: Iterable[Any] = ()
) -> GroupTable | None:
    """Splits the groups of a fresh optimizer by `rules`; other entries and schedulers stay consistent.

    Args:
        optimizer: Any optimizer that has not stepped yet.
        model: The model that names the parameters.
        rules: The arguments of `parameter_groups`.
        schedulers: Schedulers of the optimizer, whose lists of base values are split too.

    Returns:
        The groups; None if the same rules already made them.

    Raises:
        ValueError: if the optimizer has stepped, lacks an entry of that name, or supports only one group.
    """
    if vars(optimizer).get("_grouped_by") == repr(rules):
        return None
    _check_optimizer(optimizer, rules)
    memberships, names, width = rules.memberships(model)
    several = len(optimizer.param_groups) > 1
    groups: list[dict[str, Any]] = []
    origins: list[int] = []
    scales: list[float] = []
    for place, old in enumerate(optimizer.param_groups):
        prefix = f"{old.get('name', f'group{place}')}_" if several or "name" in old else ""
        own = {param: memberships.get(param, _STRANGER) for param in old["params"]}
        has_decay = "weight_decay" in old
        if not has_decay:  # no weight decay to distinguish
            own = {param: replace(membership, decays=True) for param, membership in own.items()}
        for membership, params in gathered(own, old["params"]):
            scale = _scale(old, membership)
            name = prefix + membership.name(width, has_decay)
            groups.append({**_split(old, membership, params, scale, rules), "name": name})
            origins.append(place)
            scales.append(scale)
    optimizer.param_groups[:] = named_apart(groups)
    vars(optimizer)["_grouped_by"] = repr(rules)
    _split_conversion(optimizer, origins)
    for scheduler in schedulers:
        _split_scheduler(scheduler, optimizer, origins, scales)
    return GroupTable(groups, names)


def _check_optimizer(optimizer: Optimizer, rules: GroupRules) -> None:
    name = type(optimizer).__name__
    # Adagrad creates its state in the constructor, at step 0.
    if any(float(state.get("step", 1)) > 0 for state in optimizer.state.values() if state):
        raise ValueError(f"{rules.owner}(...): {name} has stepped already; group its parameters before the first step.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(f"{rules.owner}(...): LBFGS takes a single group.")
    for group in optimizer.param_groups:
        if rules.weight_decay is not None and "weight_decay" not in group:
            raise ValueError(f"{rules.owner}(weight_decay={rules.weight_decay!r}): {name} has no weight decay.")
        for pattern, entries in rules.overrides.items():
            unknown = sorted(set(entries) - set(group) - {"name"})
            if unknown:
                known = ", ".join(sorted(set(group) - {"params", "param_names"}))
                raise ValueError(
                    f"{rules.owner}(overrides={{{pattern!r}: {entries!r}}}): {name} has no {unknown[0]!r}; "
                    f"there are {known}."
                )


def _scale(old: dict[str, Any], membership: Membership) -> float:
    """The factor of a group's learning rates relative to the group it was split from."""
    entries, base = dict(membership.entries), float(old.get("initial_lr", old["lr"]))
    return entries["lr"] / base if "lr" in entries and base else membership.scale


def _split(
    old: dict[str, Any], membership: Membership, params: list[Tensor], scale: float, rules: GroupRules
) -> dict[str, Any]:
    entries = dict(membership.entries)
    group = {key: _scaled(value, scale if key in _RATES else 1.0) for key, value in old.items()}
    if "weight_decay" in old:
        group["weight_decay"] = 0.0
        if membership.decays:
            group["weight_decay"] = old["weight_decay"] if rules.weight_decay is None else rules.weight_decay
    group |= {key: value for key, value in entries.items() if key != "lr"}
    if "lr" in entries and "initial_lr" not in old:  # exact while no scheduler has changed it
        group["lr"] = torch.full_like(old["lr"], entries["lr"]) if isinstance(old["lr"], Tensor) else entries["lr"]
    group["params"] = params
    if "param_names" in old:
        name_of = dict(zip(old["params"], old["param_names"], strict=True))
        group["param_names"] = [name_of[param] for param in params]
    return group


def _scaled(value: Any, factor: float) -> Any:
    """A scaled value; a tensor is copied, since writing to one group would otherwise change the others."""
    if isinstance(value, Tensor):
        return value.clone() if factor == 1 else value * factor
    return value if factor == 1 else value * factor


def _split_conversion(optimizer: Optimizer, origins: list[int]) -> None:
    """Splits what an earlier `from_torch_` saved for each group."""
    before = vars(optimizer).get("_before_conversion")
    if before is not None:
        vars(optimizer)["_before_conversion"] = replace(
            before,
            groups=[before.groups[place] for place in origins],
            attributes=before.attributes | {"_grouped_by"},
        )
        vars(optimizer)["_plan"] = None


def _split_scheduler(scheduler: Any, optimizer: Optimizer, origins: list[int], scales: list[float]) -> None:
    for part in schedulers_within(scheduler):
        _split_scheduler(part, optimizer, origins, scales)
    if getattr(scheduler, "optimizer", None) is not optimizer:
        return
    for name in (*_SCALED, *_COPIED):
        values = vars(scheduler).get(name)
        if isinstance(values, list | tuple) and len(values) == max(origins) + 1:
            factors = scales if name in _SCALED else [1.0] * len(origins)
            split = [_scaled(values[place], factor) for place, factor in zip(origins, factors, strict=True)]
            setattr(scheduler, name, split)
