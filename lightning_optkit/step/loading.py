# SPDX-License-Identifier: Apache-2.0
"""Loading a state dict: checked before anything is touched, then put into the dtypes and layouts the plan walks."""

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_optkit.step.codes import scale_name
from lightning_optkit.step.rule import Group, Rule
from lightning_optkit.step.shards import distribute_like, local, place_like
from lightning_optkit.step.state import StateLayout, convert_

if TYPE_CHECKING:
    from lightning_optkit.step.optimizer import OnePassOptimizer

__all__ = ["check_state_dict", "complete_groups", "restore_state"]

_STAGE_KEYS = {
    "l1",
    "cautious",
    "centralize",
    "rounding",
    "rounding_seed",
    "average_decay",
    "decoupled_weight_decay",
    "initial_lr",
}
_AVERAGES = ("ema_", "swa_", "lawa_", "num_averaged_")  # kept beside the step by an earlier run; left behind
_IMPLEMENTATION_KEYS = {"params", "param_names", "foreach", "fused", "capturable", "differentiable", "maximize"}


def check_state_dict(optimizer: "OnePassOptimizer", state_dict: dict[str, Any]) -> None:
    """Raises ValueError, in one sentence, if `state_dict` belongs to another rule or to other parameters."""
    owner = f"{type(optimizer).__name__}.load_state_dict"
    saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in groups]:
        raise ValueError(
            f"{owner}: the checkpoint has groups of {[len(g['params']) for g in saved_groups]} parameters, "
            f"this optimizer of {[len(g['params']) for g in groups]}."
        )
    for saved, group in zip(saved_groups, groups, strict=True):
        missing = set(optimizer.defaults) - set(saved) - _STAGE_KEYS - _IMPLEMENTATION_KEYS
        if missing:
            raise ValueError(f"{owner}: the checkpoint is of another rule; its groups have no {_listed(missing)}.")
        if saved.get("decoupled_weight_decay", group["decoupled_weight_decay"]) != group["decoupled_weight_decay"]:
            raise ValueError(
                f"{owner}: the checkpoint is of another rule; it has decoupled_weight_decay="
                f"{saved['decoupled_weight_decay']}."
            )
    _check_state(owner, optimizer, state_dict)


def _check_state(owner: str, optimizer: "OnePassOptimizer", state_dict: dict[str, Any]) -> None:
    average = {optimizer.average.state_name} if optimizer.average else set()
    for saved_id, group, param in _pairs(optimizer, state_dict):
        rule = optimizer._rule(group)
        scalars = {scalar.name for scalar in rule.scalars} | {"step", "num_averaged"}
        scales = {scale_name(name) for name in rule.states}
        known = {*rule.states, *scalars, *scales, "compensation", "ema", "swa", *average}
        for name, value in state_dict["state"].get(saved_id, {}).items():
            if value is None:
                continue
            if name.startswith(_AVERAGES):
                continue
            if name not in known and not _is_of_the_same_family(name, rule):
                raise ValueError(f"{owner}: the checkpoint is of another rule; it holds the state {name!r}.")
            if name not in scalars | scales and value.shape != rule.shape_of(name, param):
                raise ValueError(
                    f"{owner}: the state {name!r} has shape {list(value.shape)}, its parameter {list(param.shape)}."
                )


def _pairs(optimizer: "OnePassOptimizer", state_dict: dict[str, Any]) -> list[tuple[Any, Group, Tensor]]:
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    return [(saved_id, group, p) for saved_id, (group, p) in zip(saved_ids, params, strict=True)]


def complete_groups(optimizer: "OnePassOptimizer", defaults: list[Group]) -> None:
    """Gives back to each group what a torch state dict does not have, and the implementation that this run chose."""
    for group, default in zip(optimizer.param_groups, defaults, strict=True):
        for name, value in default.items():
            group.setdefault(name, value)
        group.update({name: default[name] for name in ("fused", "foreach") if name in default})


def restore_state(optimizer: "OnePassOptimizer", state_dict: dict[str, Any], layout: StateLayout) -> None:
    """Copies the saved state in the dtypes of `layout`.

    `Optimizer.load_state_dict` would cast it to the parameter's dtype, and so turn fp32 moments beside bf16 parameters
    into bf16; and it keeps the checkpoint's own tensors where nothing needs a cast.
    """
    for saved_id, group, param in _pairs(optimizer, state_dict):
        saved = state_dict["state"].get(saved_id, {})
        held = {name: value for name, value in saved.items() if value is not None}
        if not held:
            optimizer.state.pop(param, None)
            continue
        state = optimizer.state[param]
        state.clear()
        rule = optimizer._rule(group)
        tensors = {*rule.states, *layout.tensors((), group)}
        for name, value in held.items():
            if name in tensors:
                like = rule.like(name, param)
                restored = torch.empty_like(local(like), dtype=layout.dtype_of(name, param, rule), requires_grad=False)
                if scale_name(name) in held:
                    state[scale_name(name)] = held[scale_name(name)]
                convert_(restored, state, name, local(distribute_like(torch.as_tensor(value), like)))
                state[name] = place_like(restored, like)
        for scalar in layout.scalars(rule, rule.states):
            # torch's SGD counts no steps: a momentum buffer means that there was a first one.
            if scalar.name in held or (scalar.name != "num_averaged" and any(name in held for name in rule.states)):
                value = torch.as_tensor(held.get(scalar.name, scalar.inherited))
                state[scalar.name] = value.detach().to(param.device, torch.float32, copy=True).reshape(())


def _is_of_the_same_family(name: str, rule: Rule) -> bool:
    """State of a variant of the rule (AMSGrad's maximum) that is switched off here: left behind, as in torch."""
    return name.startswith("max_") and name.removeprefix("max_") in rule.states


def _listed(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
