# SPDX-License-Identifier: Apache-2.0
"""What the states of one-pass optimizers say of the clip and the average that a callback gave them."""

from typing import Any

__all__ = ["leave_to_callback"]


def leave_to_callback(checkpoint: dict[str, Any], stage: str) -> None:
    """Takes a stage out, so that its callback alone says what becomes of it, once.

    Args:
        checkpoint: Its states of optimizers are replaced, not changed.
        stage: "clip" or "average".
    """
    states = checkpoint.get("optimizer_states", [])
    for place, state in enumerate(states):
        if isinstance(state, dict) and isinstance(state.get("stages"), dict):
            kept = {name: value for name, value in state["stages"].items() if name != stage}
            states[place] = {**state, "stages": kept}
