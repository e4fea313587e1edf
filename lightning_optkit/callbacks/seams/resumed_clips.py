# SPDX-License-Identifier: Apache-2.0
"""What the clips of a checkpoint have learned, for the clip of the run that goes on from it.

A one-pass optimizer saves it with its own state, every other with the callback; the two are treated alike.
"""

import copy
import re
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.callbacks.seams.saved_stages import leave_to_callback
from lightning_optkit.step import Clip, StatefulClip

__all__ = ["match_clips"]

_KEY = re.compile(r"""(?P<owner>\w+)\{'clip': ["'](?P<clip>\w+\(.*\))["']\}""")


def match_clips(checkpoint: dict[str, Any], owner: str, key: str, clip: Clip) -> None:
    """Gives a clip with other settings what was learned, and warns; of another kind it drops that, and warns.

    Args:
        checkpoint: Its states of callbacks, and of optimizers, are changed.
        owner: The callback.
        key: The key of its state.
        clip: Its clip, which is not changed.
    """
    leave_to_callback(checkpoint, "clip")
    if not isinstance(clip, StatefulClip):  # it has no use for what another one has learned
        return
    before, learned = _take(checkpoint.get("callbacks", {}), owner, key)
    is_lost = not all(_loads(clip, each) for each in learned)
    if learned and not is_lost:
        checkpoint["callbacks"][key] = {"learned": learned}
    for place, state in enumerate(checkpoint.get("optimizer_states", [])):
        if isinstance(state, dict) and "clip" in state and not _loads(clip, state["clip"]):
            is_lost = True
            checkpoint["optimizer_states"][place] = {name: each for name, each in state.items() if name != "clip"}
    saved_with = f"{owner}({clip!r}): the checkpoint was saved with {before or 'another clip'}"
    if is_lost:
        rank_zero_warn(
            f"{saved_with}, and what that has learned of the norms is lost: this one begins anew; give the same clip "
            "to keep it."
        )
    elif learned:
        rank_zero_warn(f"{saved_with}; what that has learned of the norms goes on with the settings given here.")


def _take(states: dict[Any, Any], owner: str, key: str) -> tuple[str, list[Any]]:
    """The clip of another key, and what it has learned, which is taken out; empty if there is none."""
    found = {each: match for each in states if (match := _KEY.fullmatch(str(each))) and match["owner"] == owner}
    if key in states or len(found) != 1:
        return "", []
    ((other, match),) = found.items()
    state = states[other]
    learned = state.get("learned") if isinstance(state, dict) else None
    if not isinstance(learned, list):
        return match["clip"], []
    states.pop(other)
    return match["clip"], learned


def _loads(clip: StatefulClip, learned: Any) -> bool:
    try:
        copy.deepcopy(clip).load_state_dict(learned)
    except (TypeError, ValueError):
        return False
    return True
