# SPDX-License-Identifier: Apache-2.0
"""Remembers the group values that passed the checks, so that unchanged values are not checked again."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from lightning_optkit.step.arguments import checked_as
from lightning_optkit.step.rule import Group
from lightning_optkit.step.stepped import Loadable

__all__ = ["AcceptedGroups"]


@dataclass
class _Seen:
    """The values of one group, and the contents of those that can change in place, by position."""

    lr: object
    values: tuple[object, ...]
    inner: dict[int, object]


class AcceptedGroups:
    """The values that passed the checks, by group.

    Every step compares every group with them: 1 us by `timeit`, also if `lr` changed. Values are compared by identity,
    so no tensor is read; only values that can change in place are read again, and none on an accelerator.
    """

    def __init__(self) -> None:
        self._num_names = 0
        self._values_of: Callable[[Group], tuple[object, ...]] = itemgetter("lr", "params")
        self._seen: dict[int, _Seen] = {}

    def check(self, optimizer: Loadable, numbers: Iterable[int] | None) -> None:
        """Checks the groups of these numbers like the constructor, if they changed."""
        if self._num_names != len(optimizer.defaults):  # an average was added or removed
            self._look_at(optimizer)
        groups, owner = optimizer.param_groups, type(optimizer).__name__
        if not isinstance(groups, list):
            raise TypeError(f"{owner}.step: param_groups must be a list of dicts.")
        numbers = range(len(groups)) if numbers is None else numbers
        changed = [number for number in numbers if not self._holds(number, groups[number])]
        if not changed:
            return
        if not all(isinstance(group, dict) for group in groups):
            raise TypeError(f"{owner}.step: param_groups must be a list of dicts.")
        with checked_as(owner, f"{owner}.step"):
            for number in changed:
                missing = [name for name in optimizer.defaults if name not in groups[number]]
                if missing:
                    raise ValueError(f"{owner}(param_groups[{number}]=...): must have an entry {missing[0]!r}.")
                optimizer._check_all(_without_waiting(groups[number]))
            optimizer._check_together(groups)
        for number in changed:
            self._accept(number, groups[number])

    def _look_at(self, optimizer: Loadable) -> None:
        self._num_names, self._seen = len(optimizer.defaults), {}
        self._values_of = itemgetter(*(optimizer.defaults.keys() - {"lr", *optimizer._learned}))

    def _holds(self, number: int, group: Group) -> bool:
        """Whether the values of group `number`, except `lr`, are the accepted ones, and `lr` is in [0, inf)."""
        seen = self._seen.get(number)
        try:
            lr, values = group["lr"], self._values_of(group)
        except (KeyError, TypeError):  # an entry is missing, or the group is no dict
            return False
        if seen is None or not (lr is seen.lr or type(lr) is float) or not all(map(is_, values, seen.values)):
            return False
        if not isinstance(lr, Tensor):
            seen.lr = lr
        elif lr.is_cpu and lr.numel() == 1:
            lr = lr.item()
        if not isinstance(lr, Tensor) and not 0 <= lr < math.inf:
            return False
        return not seen.inner or all(_inside(values[place]) == inside for place, inside in seen.inner.items())

    def _accept(self, number: int, group: Group) -> None:
        """Remembers the values of group `number`, which passed the checks."""
        values = self._values_of(group)
        inner = {place: _inside(value) for place, value in enumerate(values) if _can_change(value)}
        self._seen[number] = _Seen(group["lr"], values, inner)


def _without_waiting(group: Group) -> Group:
    """The group for the checks; a learning rate on an accelerator, which must not be read here, is replaced by 0."""
    lr = group["lr"]
    is_away = isinstance(lr, Tensor) and not lr.is_cpu and lr.numel() == 1
    return {**group, "lr": torch.zeros((), device="cpu")} if is_away else group


def _can_change(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_can_change, value))
    return isinstance(value, list) or hasattr(value, "tolist")


def _inside(value: Any) -> object:
    """The numbers in a value; a tensor on an accelerator is represented by its id."""
    if isinstance(value, tuple | list):
        return [_inside(each) for each in value]
    if isinstance(value, Tensor) and not value.is_cpu:
        return id(value)
    return value.tolist() if hasattr(value, "tolist") else value  # torch or numpy
