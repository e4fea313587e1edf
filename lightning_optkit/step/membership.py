# SPDX-License-Identifier: Apache-2.0
"""Which parameters an optimizer has, and their state: looked up in its own groups and state before every step."""

from typing import Any, Protocol

from torch import Tensor

from lightning_optkit._native import extension

__all__ = ["Membership", "membership"]

_States = dict[Tensor, dict[str, Any]]


class Membership(Protocol):
    """The parameters as they were when this was made; asked for their state of now."""

    def states(self, state: _States, lists: list[list[Tensor]]) -> list[dict[str, Any]] | None:
        """The state of each entry; None if parameters came, went or changed places, or an entry has no state."""
        ...


def membership(state: _States, lists: list[list[Tensor]], entries: list[Tensor]) -> Membership:
    """Remembers the parameters of each group, and of which of them (`entries`, all with state) the state is wanted.

    The caller keeps the parameters alive as long.
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
