# SPDX-License-Identifier: Apache-2.0
"""Parameters of an optimizer that the module does not have: nobody knows a name, so a label stands for one.

They are told apart by their place among those of their group, which is the one with the same named parameters. Where
that leaves a choice, or the shapes differ, there is no match.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_optkit.step.rule import Group

__all__ = ["SHAPES", "Labels", "labels"]

SHAPES = "nameless_shapes"  # beside the names in the saved state of an optimizer: by number


class Labels(NamedTuple):
    """Names and labels.

    Args:
        saved: The name or label of each number in the saved groups.
        here: For each parameter of the groups here all its names, or its label.
    """

    saved: dict[Any, str]
    here: list[list[list[str]]]


def labels(
    what: str,
    state: Mapping[str, Any],
    saved_names: Mapping[Any, str],
    groups: Sequence[Group],
    aliases: Mapping[Tensor, list[str]],
) -> Labels:
    """Gives the parameters without a name a label, the same one here and in the checkpoint.

    Args:
        what: The beginning of error messages: "AdamW:".
        state: The saved state dict.
        saved_names: The names in it by number.
        groups: The groups here.
        aliases: The names of the parameters here.

    Raises:
        ValueError: if it is not known which is which.
    """
    saved = dict(saved_names)
    owners = {name: place for place, group in enumerate(state["param_groups"]) for name in _names(group, saved_names)}
    free = {place: each for place, group in enumerate(state["param_groups"]) if (each := _nameless(group, saved_names))}
    for place, numbers in free.items():
        saved |= {number: _label(index, place) for index, number in enumerate(numbers)}
    here: list[list[list[str]]] = []
    for place, group in enumerate(groups):
        own = [param for param in group["params"] if param not in aliases]
        mine = {owners[name] for param in group["params"] for name in aliases.get(param, []) if name in owners}
        if len(own) == len(group["params"]):  # goes with the next one that has no names either
            whole = (p for p in free if len(free[p]) == len(state["param_groups"][p]["params"]))
            mine = {*[*whole][:1]}
        origins = [origin for origin in free if origin in mine]
        numbers = free.pop(origins[0]) if own and origins else []
        if own and numbers:
            _check(what, place, own, numbers, state.get(SHAPES, {}), origins)
        index_of = {param: index for index, param in enumerate(own)}
        given = [saved[number] for number in numbers] or [_label(index, place) + " here" for index in range(len(own))]
        here.append([aliases.get(param) or [given[index_of[param]]] for param in group["params"]])
    return Labels(saved, here)


def _names(group: Group, names: Mapping[Any, str]) -> list[str]:
    return [names[number] for number in group["params"] if number in names]


def _nameless(group: Group, names: Mapping[Any, str]) -> list[Any]:
    return [number for number in group["params"] if number not in names]


def _label(index: int, place: int) -> str:
    return f"parameter {index} of those of its group {place} that are not the module's"


def _check(
    what: str, place: int, own: Sequence[Tensor], numbers: Sequence[Any], shapes: Mapping[Any, Any], origins: list[int]
) -> None:
    mine, saved = [tuple(param.shape) for param in own], [tuple(shapes.get(number, ())) for number in numbers]
    if len(origins) > 1 or mine != saved:
        several = f" and of its groups {origins}" if len(origins) > 1 else ""
        raise ValueError(
            f"{what} parameters of its group {place} are not the module's, so they have no names, and are of shapes "
            f"{mine} here and {saved} in the checkpoint{several}; resume with the groups of the run that saved it, or "
            "register them in the module before the run that saves."
        )
