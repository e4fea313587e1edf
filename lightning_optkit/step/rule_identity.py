# SPDX-License-Identifier: Apache-2.0
"""Identifies the rule of a state dict: rules with equal state names and shapes must not exchange state.

Our state dicts contain the rule under "rule". Those of torch's classes do not, nor do those that went through a sharded
checkpoint: they are identified by their group entries and state names.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_optkit.step.rule import Group, Rule
from lightning_optkit.step.saved import kind_of
from lightning_optkit.step.stages import ADDED_ENTRIES
from lightning_optkit.step.stepped import Loadable

__all__ = ["NEXT", "check_is_of_the_rule", "is_of_a_variant", "rule_of"]

_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable", "maximize"})
_DECOUPLED = "decoupled_weight_decay"
NEXT = "load it into an optimizer of the class that saved it, or begin from its weights alone"


def rule_of(optimizer: Loadable) -> str:
    """The class that defines the rule: for `AdamW`, and for a user's subclass of it, "Adam"."""
    return next(cls.__name__ for cls in type(optimizer).__mro__ if "_rule" in vars(cls))


def check_is_of_the_rule(what: str, optimizer: Loadable, state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError if a state dict, whose outline has been checked, belongs to another rule."""
    said = state_dict.get("rule", rule_of(optimizer))
    if not isinstance(said, str) or said != rule_of(optimizer):
        raise ValueError(
            f"{what} the checkpoint is of another rule, {kind_of(said)}; it must be of {rule_of(optimizer)!r}; {NEXT}."
        )
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        _check_group_entries(what, optimizer, saved, group)
        if "rule" not in state_dict and not state_dict["state"] and not saved.keys() & ADDED_ENTRIES:
            _check_entries_of_torch(what, optimizer, saved)


def _check_group_entries(what: str, optimizer: Loadable, saved: Group, group: Group) -> None:
    """Compares the entries; those unknown to torch and to this package belong to a scheduler or the user."""
    missing = optimizer.defaults.keys() - saved.keys() - ADDED_ENTRIES - _IMPLEMENTATION - {_DECOUPLED}
    if missing:
        raise ValueError(f"{what} the checkpoint is of another rule; its groups have no {_listed(missing)}; {NEXT}.")
    foreign = (saved.keys() & _entries_of_all(_base_of(optimizer))) - group.keys() - ADDED_ENTRIES - _IMPLEMENTATION
    if foreign:
        raise ValueError(f"{what} the checkpoint is of another rule; its groups have {_listed(foreign)}; {NEXT}.")
    decoupled = saved.get(_DECOUPLED, group[_DECOUPLED])
    if hasattr(decoupled, "shape") or decoupled != group[_DECOUPLED]:  # the truth of an array is undefined
        raise ValueError(f"{what} the checkpoint is of another rule; it has {_DECOUPLED}={kind_of(decoupled)}; {NEXT}.")


def _check_entries_of_torch(what: str, optimizer: Loadable, saved: Group) -> None:
    """Adamax and RAdam of torch differ only in one entry before the first step, Adamax and AdaBelief in none."""
    if optimizer._torch_class is None:
        raise ValueError(f"{what} the checkpoint is of another rule; torch has no {rule_of(optimizer)!r}; {NEXT}.")
    torchs = _build(optimizer._torch_class).param_groups[0]
    if (_DECOUPLED in saved) != (_DECOUPLED in torchs):
        has = "have" if _DECOUPLED in saved else "have no"
        raise ValueError(f"{what} the checkpoint is of another rule; its groups {has} {_DECOUPLED!r}; {NEXT}.")


def _build(cls: Callable[[list[torch.Tensor]], Optimizer]) -> Optimizer:
    return cls([torch.zeros(1, 1, device="cpu")])


def is_of_a_variant(name: str, rule: Rule) -> bool:
    """Whether this is state of a variant of the rule (AMSGrad's maximum) that is off here, and so ignored."""
    return name.startswith("max_") and name.removeprefix("max_") in rule.state_names


@cache
def _entries_of_all(base: type) -> frozenset[str]:
    """The group entries of all optimizers of torch and of all subclasses of our `base`."""
    torchs: list[type] = [value for value in vars(torch.optim).values() if isinstance(value, type)]
    ours = [cls for cls in _descendants(base) if cls.__module__.startswith("lightning_optkit.")]
    return frozenset[str]().union(*(inspect.signature(cls).parameters for cls in [*torchs, *ours])) - {"params"}


def _base_of(optimizer: Loadable) -> type:
    """The common base of our optimizers: the last class in the MRO that defines `_rule`."""
    return [cls for cls in type(optimizer).__mro__ if "_rule" in vars(cls)][-1]


def _descendants(cls: type) -> Iterator[type]:
    each: type
    for each in cls.__subclasses__():
        yield each
        yield from _descendants(each)


def _listed(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
