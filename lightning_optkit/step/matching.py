# SPDX-License-Identifier: Apache-2.0
"""Fits the saved state of an optimizer to groups in another order or division, by the names of the parameters.

torch gives the states, and the settings of groups, to whatever stands at the same place. Here a state belongs to a
name, and settings to the group of the same names. What would be a guess is refused; nothing is changed before.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_optkit.step.rule import Group

__all__ = ["Matched", "match_groups", "names_in_groups"]

_NO_SETTINGS = {"params", "param_names", "name"}
_NEXT = "resume with the groups of the run that saved it, from the same configure_optimizers and ParameterGroups"


class Matched(NamedTuple):
    """A state dict in the order of the groups here.

    Args:
        state_dict: The state dict.
        origins: For each group the index of the saved one whose settings it has.
    """

    state_dict: dict[str, Any]
    origins: list[int]


def names_in_groups(state_dict: Mapping[str, Any]) -> dict[Any, str] | None:
    """The names by number, where groups were built from `named_parameters()`: torch keeps them in "param_names"."""
    found: dict[Any, str] = {}
    for group in state_dict["param_groups"]:
        names = group.get("param_names")
        if not isinstance(names, list | tuple) or len(names) != len(group["params"]):
            return None
        if not all(isinstance(name, str) for name in names):
            return None
        found.update(zip(group["params"], names, strict=True))
    return found or None


def match_groups(
    what: str,
    state_dict: Mapping[str, Any],
    saved_names: Mapping[Any, str],
    groups: Sequence[Group],
    names: Sequence[Sequence[Collection[str]]],
) -> Matched:
    """Fits a state dict to these groups.

    Args:
        what: The beginning of error messages: "AdamW:".
        state_dict: The state dict; its outline has been checked.
        saved_names: The name of each number in its groups.
        groups: The groups here.
        names: For each of their parameters all its names; a shared one has several.

    Raises:
        ValueError: for other parameters, or groups whose settings are not known.
    """
    saved = state_dict["param_groups"]
    numbers = _numbers(what, saved_names, names)
    if numbers == [list(group["params"]) for group in saved]:
        return Matched(dict(state_dict), [*range(len(saved))])
    owners = {number: place for place, group in enumerate(saved) for number in group["params"]}
    concerned = [sorted({owners[number] for number in each}) for each in numbers]
    empty = iter([place for place, group in enumerate(saved) if not group["params"]])
    origins = []
    for place, each in enumerate(numbers):
        origin = concerned[place][0] if each else next(empty, None)
        if origin is None:
            raise ValueError(f"{what} its group {place} has no parameters, and none of the checkpoint's; {_NEXT}.")
        origins.append(origin)
    for place, each in enumerate(numbers):
        if each and set(each) != set(saved[origins[place]]["params"]):
            _check_agreement(what, saved, saved_names, each, owners)
            _check_division(what, groups, numbers, saved_names, owners, place)
    fitted = [_fitted(saved[o], group, each) for o, group, each in zip(origins, groups, numbers, strict=True)]
    return Matched({**state_dict, "param_groups": fitted}, origins)


def _numbers(what: str, saved_names: Mapping[Any, str], names: Sequence[Sequence[Collection[str]]]) -> list[list[Any]]:
    """The saved number of each parameter here."""
    places = {name: number for number, name in saved_names.items()}
    numbers = [[next((places[name] for name in each if name in places), None) for each in group] for group in names]
    found = {number for group in numbers for number in group}
    lacking = [next(iter(each)) for group in names for each in group if not any(name in places for name in each)]
    unused = [name for number, name in saved_names.items() if number not in found]
    if lacking and unused:
        raise ValueError(
            f"{what} the optimizer of the checkpoint has {unused[0]} and no {lacking[0]}, which this one has; if it "
            "was renamed, rename it in 'parameter_names' of checkpoint['optimizer_states'] in on_load_checkpoint, else "
            "resume with the parameters of the run that saved it."
        )
    if lacking or unused:
        says = f"has no {lacking[0]}, which this" if lacking else f"has {unused[0]}, which this"
        raise ValueError(
            f"{what} the optimizer of the checkpoint {says} one {'has' if lacking else 'lacks'}; resume with the "
            "parameters of the run that saved it, or begin a run from its weights alone."
        )
    return numbers


def _check_agreement(
    what: str, saved: Sequence[Group], names: Mapping[Any, str], numbers: Sequence[Any], owners: Mapping[Any, int]
) -> None:
    """Raises if parameters of one group here had different settings."""
    first = numbers[0]
    for number in numbers[1:]:
        if key := _difference(one := saved[owners[first]], other := saved[owners[number]]):
            raise ValueError(
                f"{what} {names[first]} and {names[number]} are in one group here, and in groups of the checkpoint "
                f"with {key}={_shown(one, key)} and {_shown(other, key)}; {_NEXT}."
            )


def _check_division(
    what: str,
    groups: Sequence[Group],
    numbers: Sequence[Sequence[Any]],
    names: Mapping[Any, str],
    owners: Mapping[Any, int],
    place: int,
) -> None:
    """Raises if groups here differ in settings that the checkpoint has in common, so that loading would undo them."""
    mine = {owners[number] for number in numbers[place]}
    for other, each in enumerate(numbers[:place]):
        shared = [number for number in each if owners[number] in mine]
        if shared and (key := _difference(groups[other], groups[place])):
            raise ValueError(
                f"{what} {names[shared[0]]} and {names[numbers[place][0]]} have {key}={_shown(groups[other], key)} and "
                f"{_shown(groups[place], key)} here, and are in groups of the checkpoint that do not tell them apart; "
                f"{_NEXT}, and change them in on_train_start."
            )


def _fitted(saved: Group, group: Group, numbers: list[Any]) -> Group:
    """The settings of a saved group with the parameters of this one, which keeps its own names."""
    fitted = {key: value for key, value in saved.items() if key != "param_names"}
    if set(numbers) != set(saved["params"]) and "name" in group:
        fitted["name"] = group["name"]
    return {**fitted, "params": numbers}


def _difference(one: Group, other: Group) -> str | None:
    """The first setting that differs."""
    keys = [key for key in (*one, *other) if key not in _NO_SETTINGS]
    return next((key for key in keys if not _same(one.get(key), other.get(key))), None)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one.cpu(), other.cpu()))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    return bool(one == other)


def _shown(group: Group, key: str) -> str:
    return repr(group.get(key))
