# SPDX-License-Identifier: Apache-2.0
"""The interface of an optimizer to its step, and the facts about each of its groups, looked up in every step."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit.step.average import Average
from lightning_optkit.step.clip import Clip
from lightning_optkit.step.rule import Group, Rule
from lightning_optkit.step.segments import Segment

__all__ = ["GroupContext", "Loadable", "Stepped", "group_contexts"]


class GroupContext(NamedTuple):
    """One parameter group in a step.

    Args:
        number: Its index in `optimizer.param_groups`.
        group: The group.
        rule: Its update rule.
        state_names: Names of the rule's states under its settings.
    """

    number: int
    group: Group
    rule: Rule
    state_names: tuple[str, ...]


class Stepped(Protocol):
    """The part of an optimizer that the step, its plan and its explanation use."""

    param_groups: list[Group]
    state: Any
    clip: Clip | None
    average: Average | None
    state_dtype: torch.dtype | Literal["int8"]
    record_statistics: bool
    leaves_out: Callable[[], Set[Tensor]] | None

    @property
    def _owner(self) -> str:
        """The class name, for error messages."""
        ...

    def _rule(self, group: Group) -> Rule:
        """The update rule of a group."""
        ...

    def _why_reference(self, param: Tensor, group: Group) -> str | None:
        """Why a parameter takes the reference path, or None."""
        ...

    def _reference_segment(self, rule: Rule) -> type[Segment]:
        """The class that steps the parameters of `rule` on the reference path."""
        ...

    def _learn(self, observed: Tensor) -> None:
        """Computes the next estimate of a rule with one."""
        ...

    def _check_changed(self, numbers: Iterable[int] | None = None) -> None:
        """Raises if an entry of a group was set to a value that the constructor refuses."""
        ...


class Loadable(Stepped, Protocol):
    """The part of an optimizer that the checks of its groups and the loading of a state dict use."""

    defaults: Group
    _torch_class: ClassVar[type[Optimizer] | None]
    _learned: ClassVar[tuple[str, ...]]
    _carried: ClassVar[tuple[str, ...]]
    _shown: Mapping[Tensor, Tensor]

    def _full_precision_of(self, param: Tensor) -> Tensor:
        """The local part of a 16-bit parameter in fp32."""
        ...

    def _completed(self, saved: Group, group: Group) -> Group:
        """A saved group completed by the entries of the rule that torch's class lacks."""
        ...

    def _check_all(self, group: Group) -> None:
        """Raises if an entry is out of range."""
        ...

    def _check_learned(self, group: Group) -> None:
        """Raises for an entry of a loaded group that the rule cannot have written."""
        ...

    def _check_together(self, groups: Sequence[Group]) -> None:
        """Raises for groups that are incompatible with each other."""
        ...

    def _forget_steps(self) -> None:
        """Discards the plan, since state or groups were replaced."""
        ...


def group_contexts(optimizer: Stepped) -> list[GroupContext]:
    """The contexts of the optimizer's current groups."""
    found = []
    for number, group in enumerate(optimizer.param_groups):
        rule = optimizer._rule(group)
        found.append(GroupContext(number, group, rule, rule.kept_names(group)))
    return found
