# SPDX-License-Identifier: Apache-2.0
"""What the step asks of an optimizer, anew each time, and what it then knows of each of its groups."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit.step.rule import Average, Clip, Group, Rule
from lightning_optkit.step.segments import Segment

__all__ = ["GroupContext", "Loadable", "Stepped", "group_contexts"]


class GroupContext(NamedTuple):
    """One parameter group, as a step sees it.

    Args:
        number: Its place in `optimizer.param_groups`.
        group: Itself.
        rule: What it is updated by.
        state_names: The state that it keeps for the rule under its settings.
    """

    number: int
    group: Group
    rule: Rule
    state_names: tuple[str, ...]


class Stepped(Protocol):
    """An optimizer, as far as the step, its plan and its explanation look at it."""

    param_groups: list[Group]
    state: Any
    clip: Clip | None
    average: Average | None
    state_dtype: torch.dtype | Literal["int8"]
    record_statistics: bool

    @property
    def _owner(self) -> str:
        """The class, for messages."""
        ...

    def _rule(self, group: Group) -> Rule:
        """The rule of a group."""
        ...

    def _why_reference(self, param: Tensor, group: Group) -> str | None:
        """The reason why a parameter takes the reference path, or None."""
        ...

    def _reference_segment(self, rule: Rule) -> type[Segment]:
        """What steps the parameters of `rule` that take the reference path."""
        ...

    def _learn(self, observed: Tensor) -> None:
        """Makes the next estimate of a rule with one."""
        ...

    def _check_changed(self, numbers: Iterable[int] | None = None) -> None:
        """Raises for an entry of a group that was set to what the constructor refuses."""
        ...


class Loadable(Stepped, Protocol):
    """An optimizer, as far as the checks of its groups and the loading of a state dict look at it."""

    defaults: Group
    torch_class: ClassVar[type[Optimizer] | None]
    _learned: ClassVar[tuple[str, ...]]
    _carried: ClassVar[tuple[str, ...]]

    def _completed(self, saved: Group, group: Group) -> Group:
        """A saved group with the entries of the rule that torch's class lacks."""
        ...

    def _check_all(self, group: Group) -> None:
        """Raises for an entry that is out of range."""
        ...

    def _check_learned(self, group: Group) -> None:
        """Raises for an entry of a loaded group that the rule cannot have written."""
        ...

    def _check_together(self, groups: Sequence[Group]) -> None:
        """Raises for groups that do not go together."""
        ...

    def _forget_steps(self) -> None:
        """For state or groups that are others now."""
        ...


def group_contexts(optimizer: Stepped) -> list[GroupContext]:
    """Of the groups that the optimizer has now."""
    found = []
    for number, group in enumerate(optimizer.param_groups):
        rule = optimizer._rule(group)
        found.append(GroupContext(number, group, rule, rule.kept_names(group)))
    return found
