# SPDX-License-Identifier: Apache-2.0
"""The ring of snapshots that LAWA keeps, when it was written for another number of them."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["is_snapshot", "ring_for", "snapshot_names"]


def snapshot_names(base: str, k: int) -> list[str]:
    """The names of `k` snapshots in a state."""
    return [f"{_prefix(base)}{place}" for place in range(k)]


def is_snapshot(entry: object, base: str) -> bool:
    """Whether an entry of a state is a snapshot of this average, in a ring of any length."""
    return isinstance(entry, str) and entry.startswith(prefix := _prefix(base)) and entry[len(prefix) :].isdecimal()


def _prefix(base: str) -> str:
    return f"{base}_snapshot_"


@torch.inference_mode(False)
@torch.no_grad()
def ring_for(state: Mapping[str, Tensor], base: str, counter: str, k: int) -> dict[str, Tensor]:
    """The state with a ring of `k` snapshots: the newest that fit, the oldest of them first.

    Args:
        state: The state of one parameter, which is not changed.
        base: The name of the average.
        counter: The name of its number of snapshots so far.
        k: The length of the ring.
    """
    names = snapshot_names(base, k)
    held = [name for name in state if is_snapshot(name, base)]
    if not held or {*held} == {*names}:
        return dict(state)
    ring = [state[name] for name in sorted(held, key=lambda name: int(name[len(_prefix(base)) :]))]
    taken = int(state.get(counter, 0))
    newest = [ring[place % len(ring)] for place in range(max(0, taken - min(len(ring), k)), taken)]
    newest += [torch.zeros_like(ring[0]) for _ in range(k - len(newest))]
    rest = {name: value for name, value in state.items() if name not in held}
    return {**rest, **dict(zip(names, newest, strict=True)), counter: torch.full((), float(min(taken, len(ring), k)))}
