# SPDX-License-Identifier: Apache-2.0
"""Scheduled entries of parameter groups, each with its own base value.

The base value is stored in the group as `initial_<name>`, like torch's `initial_lr`, so it is in every checkpoint, and
a group that is added later has its own.
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit import optimizers
from lightning_optkit.callbacks.scheduling.target import Target
from lightning_optkit.optimizers.convert import one_pass_class
from lightning_optkit.step import OnePassOptimizer

__all__ = ["entry_names", "group_targets", "groups_with", "keeper_of", "normalized"]

_RULES = [getattr(optimizers, name) for name in optimizers.__all__]
_KEPT_BY_ANY = frozenset[str]().union(*(getattr(rule, "kept_entries", ()) for rule in _RULES))
_SHORT = {"beta1": "betas[0]", "beta2": "betas[1]", "beta3": "betas[2]"}


def normalized(name: str) -> str:
    """The canonical name of an entry: "beta1" is "betas[0]"."""
    return _SHORT.get(name, name)


def group_targets(given: Iterable[Optimizer], name: str, base: float | None) -> list[Target]:
    """The entry `name` of every group that has it.

    Args:
        given: The optimizers to search.
        name: Normalized name, "lr" or "betas[0]".
        base: Value at factor 1; None: each group's own.
    """
    key, index = _parsed(name)
    several = sum(len(optimizer.param_groups) for optimizer in given) > 1
    targets = []
    for place, optimizer in enumerate(given):
        for group_place, group, _ in groups_with(optimizer, name):
            label = (
                f"{name}/{group.get('name', f'{type(optimizer).__name__} {place}.{group_place}')}" if several else name
            )
            own = base if base is not None else _base(group, name, key, index)
            targets.append(Target(label, own, partial(_write, group, key, index)))
    return targets


def groups_with(optimizer: Optimizer, name: str) -> Iterator[tuple[int, dict[str, Any], Any]]:
    """Place and value of each group whose entry `name`, normalized, is a number that can be set."""
    key, index = _parsed(name)
    kept = _kept_by(optimizer)
    for place, group in enumerate(optimizer.param_groups):
        value = None if key in kept else _number(group, key, index)
        if value is not None:
            yield place, group, value


def keeper_of(given: Iterable[Optimizer], name: str) -> Optimizer | None:
    """The first optimizer that reserves the entry `name` for itself, or None."""
    key, _ = _parsed(name)
    for optimizer in given:
        if key in _kept_by(optimizer) and any(key in group for group in optimizer.param_groups):
            return optimizer
    return None


def entry_names(given: Iterable[Optimizer]) -> list[str]:
    """All entries that are settable numbers, by the names that `group_targets` accepts."""
    names: dict[str, None] = {}
    for kept, group in ((_kept_by(optimizer), group) for optimizer in given for group in optimizer.param_groups):
        for key, value in group.items():
            if key.startswith("initial_") or key in kept:
                continue
            if isinstance(value, tuple | list):
                names |= {f"{key}[{i}]": None for i in range(len(value)) if _number(group, key, i) is not None}
            elif _number(group, key, None) is not None:
                names[key] = None
    return list(names)


def _kept_by(optimizer: Optimizer) -> frozenset[str]:
    """Entries that are not settings; for an unknown rule, those that any of our rules reserves."""
    rule = type(optimizer) if isinstance(optimizer, OnePassOptimizer) else one_pass_class(type(optimizer))
    return _KEPT_BY_ANY if rule is None else rule.kept_entries


@lru_cache(64)
def _parsed(name: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(\w+)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


def _number(group: dict[str, Any], key: str, index: int | None) -> Any:
    """The number at this position, or None if it is not a continuous number."""
    value = None if key == "params" else group.get(key)
    if index is not None:
        value = value[index] if isinstance(value, tuple | list) and index < len(value) else None
    if isinstance(value, Tensor):
        return value if value.numel() == 1 else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _base(group: dict[str, Any], name: str, key: str, index: int | None) -> float:
    initial = f"initial_{name}"
    if not group.get(initial):  # another callback may have set the value after 0 was stored
        group[initial] = float(_number(group, key, index))
    return float(group[initial])


def _write(group: dict[str, Any], key: str, index: int | None, value: float) -> None:
    old = _number(group, key, index)
    if isinstance(old, Tensor):
        old.fill_(value)  # in place, since captured graphs hold this tensor
    elif index is None:
        group[key] = value
    else:
        group[key] = type(group[key])((*group[key][:index], value, *group[key][index + 1 :]))
