# SPDX-License-Identifier: Apache-2.0
"""Loads a state dict. Everything is checked and built before anything is replaced, so the replacement cannot fail."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_optkit._checks import check_one_of
from lightning_optkit._torch_private import load_post_hooks, load_pre_hooks
from lightning_optkit.step.arguments import checked_as
from lightning_optkit.step.clip import StatefulClip
from lightning_optkit.step.matching import match_groups, names_in_groups
from lightning_optkit.step.numbers import ROUNDINGS
from lightning_optkit.step.packed import unpacked
from lightning_optkit.step.restoring import Place, check_state, restored
from lightning_optkit.step.rule import Group, State
from lightning_optkit.step.rule_identity import check_is_of_the_rule
from lightning_optkit.step.saved import kind_of, saved_dict
from lightning_optkit.step.saved_stages import read_stages
from lightning_optkit.step.split_weights import LOW_ORDER_PARTS
from lightning_optkit.step.state import StateLayout
from lightning_optkit.step.stepped import Loadable

__all__ = ["check_outline", "load", "places"]


@dataclass(frozen=True)
class _Loaded:
    """The new groups and state of an optimizer."""

    groups: list[Group]
    state: defaultdict[Tensor, State]


def load(optimizer: Loadable, state_dict: dict[str, Any]) -> None:
    """Loads a state dict, running torch's hooks before and after.

    Raises:
        TypeError: for an entry of a wrong type; nothing is changed then.
        ValueError: for a state dict of another rule or other groups, or an invalid entry; nothing is changed then.
    """
    saved_dict(_what(optimizer), state_dict)
    state_dict = state_dict.copy()
    for pre_hook in load_pre_hooks(optimizer).values():
        changed = pre_hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    with torch.inference_mode(False), torch.no_grad():  # the result outlives an inference mode
        state_dict = _by_names(optimizer, state_dict)
        loaded = _read(optimizer, state_dict)
        stages = read_stages(_what(optimizer), optimizer, state_dict)
        stages.set_decay(loaded.groups, optimizer.param_groups)
        other_rounding = _other_rounding(_what(optimizer), state_dict["param_groups"], loaded.groups)
        for said in (*stages.says, *other_rounding):  # before the replacement: a filter may turn them into errors
            warnings.warn(said, stacklevel=3)
        if stages.clip is not None and isinstance(optimizer.clip, StatefulClip):
            optimizer.clip.load_state_dict(stages.clip)
        optimizer.param_groups, optimizer.state = loaded.groups, loaded.state
    optimizer._forget_steps()
    for post_hook in load_post_hooks(optimizer).values():
        post_hook(optimizer)


def _what(optimizer: Loadable) -> str:
    """The beginning of error messages."""
    return f"{type(optimizer).__name__}.load_state_dict(state_dict=...):"


def _read(optimizer: Loadable, state_dict: Mapping[str, Any]) -> _Loaded:
    """Checks the state dict, then builds everything that is loaded."""
    what = _what(optimizer)
    check_outline(what, optimizer, state_dict)
    pairs = zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    saved_groups = [optimizer._completed(dict(saved), group) for saved, group in pairs]
    check_is_of_the_rule(what, optimizer, {**state_dict, "param_groups": saved_groups})
    groups = _groups(what, optimizer, saved_groups)
    state = state_dict["state"]
    saved_ids = chain.from_iterable(saved["params"] for saved in saved_groups)
    saved_states = [state.get(saved_id, {}) for saved_id in saved_ids]
    loaded = list(zip(places(optimizer, groups), saved_states, strict=True))
    loaded = [(place, unpacked(f"{what} parameter {place.number}", saved, place.signs)) for place, saved in loaded]
    for place, saved in loaded:
        check_state(what, place, saved)
    built = {place.param: restored(place, saved) for place, saved in loaded}
    return _Loaded(groups, defaultdict(dict, {param: entries for param, entries in built.items() if entries}))


def _by_names(optimizer: Loadable, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict in the order of these groups, if both were built from `named_parameters()` of the same names."""
    what = _what(optimizer)
    check_outline(what, optimizer, state_dict, any_sizes=True)
    saved, groups = names_in_groups(state_dict), optimizer.param_groups
    own = names_in_groups({"param_groups": groups})
    if not saved or not own or sorted(saved.values()) != sorted(own.values()) or len({*own.values()}) != len(own):
        return state_dict
    names = [[[own[param]] for param in group["params"]] for group in groups]
    return match_groups(what, state_dict, saved, groups, names).state_dict


def places(optimizer: Loadable, groups: list[Group]) -> list[Place]:
    """The targets of the state, one per parameter, if the optimizer had these groups."""
    layout = StateLayout(optimizer.average, optimizer.state_dtype)
    each = [(param, group) for group in groups for param in group["params"]]
    return [
        Place(number, param, group, optimizer._rule(group), optimizer._carried, layout)
        for number, (param, group) in enumerate(each)
    ]


def check_outline(what: str, optimizer: Loadable, state_dict: Mapping[str, Any], *, any_sizes: bool = False) -> None:
    """Raises unless the number of groups and of their parameters match, and all state belongs to these parameters.

    Args:
        what: The beginning of error messages.
        optimizer: The optimizer.
        state_dict: The state dict.
        any_sizes: Leaves out the comparison of the numbers.
    """
    saved = saved_dict(what, state_dict, ("state", "param_groups"))
    groups, state = saved["param_groups"], saved_dict(f"{what} 'state'", saved["state"])
    if not isinstance(groups, list | tuple):
        raise TypeError(f"{what} 'param_groups' must be a list, got {type(groups).__name__}.")
    for number, group in enumerate(groups):
        held = saved_dict(f"{what} param_groups[{number}]", group, ("params",))
        if not isinstance(held["params"], list | tuple):
            kind = type(held["params"]).__name__
            raise TypeError(f"{what} param_groups[{number}]['params'] must be a list, got {kind}.")
    sizes, own = ([len(group["params"]) for group in each] for each in (groups, optimizer.param_groups))
    if sizes != own and not any_sizes:
        raise ValueError(
            f"{what} the checkpoint has groups of {sizes} parameters, this optimizer of {own}; build it with the "
            "groups of the one that was saved."
        )
    numbers = list(chain.from_iterable(group["params"] for group in groups))
    if not all(isinstance(number, Hashable) for number in numbers) or len(set(numbers)) != len(numbers):
        raise ValueError(f"{what} 'params' of its groups must be numbers of parameters, each there once.")
    for number, entries in state.items():
        if number not in set(numbers):
            raise ValueError(f"{what} 'state' must be of parameters of its groups, but holds {kind_of(number)}.")
        saved_dict(f"{what} the state of parameter {number!r}", entries)


def _other_rounding(what: str, saved_groups: list[Group], groups: list[Group]) -> list[str]:
    """A warning, if 16-bit parameters are rounded in another way than before the checkpoint."""
    for saved, group in zip(saved_groups, groups, strict=True):
        before, now = saved.get("rounding", group["rounding"]), group["rounding"]
        if before != now and any(param.dtype in (torch.bfloat16, torch.float16) for param in group["params"]):
            drops = before in LOW_ORDER_PARTS and now not in LOW_ORDER_PARTS
            rest = ", and drops the low bits of the weights" if drops else ""
            return [f"{what} continues rounding={before!r} of the checkpoint as {now!r}{rest}."]
    return []


def _groups(what: str, optimizer: Loadable, saved_groups: list[Group]) -> list[Group]:
    """The new groups.

    As in torch, each is the saved group with the current parameters and their names. Entries that torch's state dicts
    lack come from the current group, and so do those that select the implementation, and how numbers are stored: a
    checkpoint of fp32 weights says nothing of the rounding of 16-bit ones.
    """
    try:
        copied = copy.deepcopy([{**saved, "params": None} for saved in saved_groups])
    except Exception as error:
        raise TypeError(f"{what} its groups must hold what can be copied, but {type(error).__name__} came.") from error
    for number, (loaded, group) in enumerate(zip(copied, optimizer.param_groups, strict=True)):
        with checked_as("", f"{what} param_groups[{number}]"):
            check_one_of("", "rounding", loaded.get("rounding", group["rounding"]), ROUNDINGS)
        kept = {name: group[name] for name in ("params", "fused", "foreach", "rounding") if name in group}
        lacking = [name for name in (*optimizer.defaults, "param_names") if name not in loaded and name in group]
        loaded.update({name: group[name] for name in lacking} | kept)
        with checked_as(type(optimizer).__name__, f"{what} param_groups[{number}]"):
            optimizer._check_all(loaded)
            optimizer._check_learned(loaded)
    with checked_as(type(optimizer).__name__, f"{what} param_groups"):
        optimizer._check_together(copied)
    return copied
