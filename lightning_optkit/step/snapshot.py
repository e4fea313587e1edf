# SPDX-License-Identifier: Apache-2.0
"""Notices that a parameter list or a state tensor was replaced, by identity: cheap enough for every step."""

from typing import Any, Protocol

from torch import Tensor

from lightning_optkit._native import extension

__all__ = ["Snapshot", "take_snapshot"]


class Snapshot(Protocol):
    """What was seen, to be compared with what is there now."""

    def unchanged(self) -> bool:
        """True if every object is still the same one."""
        ...


def take_snapshot(state: dict[Tensor, dict[str, Any]], lists: list[list[Tensor]]) -> Snapshot:
    """Remembers the entries of `lists`, of `state`, and of every dict in it."""
    if extension is not None:
        compiled: Snapshot = extension.Snapshot(state, lists)
        return compiled
    return _PythonSnapshot(state, lists)


class _PythonSnapshot:
    def __init__(self, state: dict[Tensor, dict[str, Any]], lists: list[list[Tensor]]) -> None:
        self._state, self._lists = state, lists
        self._seen = self._objects()

    def unchanged(self) -> bool:
        now = self._objects()
        return len(now) == len(self._seen) and all(a is b for a, b in zip(now, self._seen, strict=True))

    def _objects(self) -> list[object]:
        objects: list[object] = [param for params in self._lists for param in params]
        for param, entry in self._state.items():
            objects += [param, entry, *entry.values()]
        return objects
