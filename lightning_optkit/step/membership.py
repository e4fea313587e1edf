# SPDX-License-Identifier: Apache-2.0
"""The parameters of an optimizer and their state, looked up in its groups and state before every step."""

from typing import Any, Protocol

from torch import Tensor

from lightning_optkit._native import extension

__all__ = ["Membership", "membership"]

_States = dict[Tensor, dict[str, Any]]


class Membership(Protocol):
    """A snapshot of the parameters, which can return their current state."""

    def states(self, state: _States, lists: list[list[Tensor]]) -> list[dict[str, Any]] | None:
        """The current state of each entry; None if parameters were added, removed or reordered, or lack state."""
        ...


def membership(state: _States, lists: list[list[Tensor]], entries: list[Tensor]) -> Membership:
    """Takes a snapshot of the parameters of each group; `entries` are those whose state is wanted, and all have state.

    The caller must keep the parameters alive as long as the result.
    """
    if extension is not None:
        compiled: Membership = extension.Membership(state, lists, entries)
        return compiled
    return _PythonMembership(lists, entries)


class _PythonMembership:
    def __init__(self, lists: list[list[Tensor]], entries: list[Tensor]) -> None:
        self._lists, self._entries = [list(params) for params in lists], entries

    def states(self, state: _States, lists: list[list[Tensor]]) -> list[dict[str, Any]] | None:
        if [len(params) for params in lists] != [len(params) for params in self._lists]:
            return None
        before = (param for params in self._lists for param in params)
        if any(param is not other for params in lists for param, other in zip(params, before, strict=False)):
            return None
        found = [state.get(param) for param in self._entries]
        return found if all(isinstance(entry, dict) for entry in found) else None  # type: ignore[return-value]
