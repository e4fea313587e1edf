# SPDX-License-Identifier: Apache-2.0
"""The clip and the average that a state dict was saved with, beside those of the optimizer that loads it.

The same holds as for the callbacks of a resumed run: the settings given now count, what was learned or averaged goes on
with them, and a warning says so; what is of another kind is left behind, with a warning. Only damage is refused.

State dicts of torch's classes, of sharded checkpoints, and of former versions do not say what they were saved with.
"""

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from lightning_optkit.step.average import Average
from lightning_optkit.step.clip import Clip, StatefulClip
from lightning_optkit.step.rule import Group
from lightning_optkit.step.saved import kind_of, saved_dict
from lightning_optkit.step.stepped import Loadable

__all__ = ["LoadedStages", "read_stages", "stages_of"]

_AVERAGES = ("ema", "power_ema", "swa")
_START = ("start", "start_interval")  # a run may count it anew; an average that has begun does not need it


class LoadedStages(NamedTuple):
    """What an optimizer takes over.

    Args:
        clip: What its clip loads; None if nothing.
        own_decay: Whether its average has its own decay, not that of the saved groups.
        says: One warning per stage that is another.
    """

    clip: Any
    own_decay: bool
    says: list[str]

    def set_decay(self, loaded: list[Group], groups: list[Group]) -> None:
        """Gives loaded groups the decay, and the base of its schedule, of the present ones, if these count."""
        for group, own in zip(loaded, groups, strict=True) if self.own_decay else ():
            group.pop("initial_average_decay", None)
            group.update({name: own[name] for name in ("average_decay", "initial_average_decay") if name in own})


def stages_of(clip: Clip | None, average: Average | None) -> dict[str, str | None]:
    """The entry "stages" of a state dict.

    Example:
        >>> from lightning_optkit.averaging import EMA
        >>> stages_of(None, EMA(0.9, start=100))
        {'clip': None, 'average': 'EMA(decay=0.9)'}
    """
    return {"clip": None if clip is None else _shown(clip), "average": None if average is None else _shown(average)}


def read_stages(what: str, optimizer: Loadable, state_dict: Mapping[str, Any]) -> LoadedStages:
    """Compares a state dict, whose outline has been checked, with an optimizer; changes nothing.

    Args:
        what: The beginning of error messages.
        optimizer: The optimizer.
        state_dict: The state dict.

    Raises:
        TypeError: for an entry of a wrong type.
        ValueError: for what no clip of this kind has learned.
    """
    saved = saved_dict(f"{what} 'stages'", state_dict.get("stages", {}))
    for name, value in saved.items():
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{what} the entry {name!r} of 'stages' must be text or None, got {kind_of(value)}.")
    clip, says_clip = _clip(what, optimizer.clip, state_dict, saved)
    own_decay, says_average = _average(what, optimizer.average, state_dict, saved)
    return LoadedStages(clip, own_decay, [said for said in (says_clip, says_average) if said])


def _clip(what: str, clip: Clip | None, state_dict: Mapping[str, Any], saved: Mapping[str, Any]) -> tuple[Any, str]:
    """What the clip loads, and what there is to say of it."""
    if not isinstance(clip, StatefulClip) or "clip" not in state_dict:
        return None, ""
    before, now = saved.get("clip"), _shown(clip)
    if before and _kind(before) != _kind(now):
        lost = "what that has learned of the norms is lost, and this one begins anew"
        return None, f"{what} the checkpoint was saved with clip={before}, not {now}; {lost}."
    try:  # on a copy, so that a failure leaves the clip as it is
        copy.deepcopy(clip).load_state_dict(state_dict["clip"])
    except Exception as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{what} 'clip' must be what {now} has learned, and it is not; give the clip of the run that saved it, or "
            "take 'clip' out of the state dict, and this one begins anew."
        ) from error
    goes_on = f"what that has learned of the norms goes on as clip={now}, the one given here"
    return state_dict["clip"], f"{what} the checkpoint was saved with clip={before}; {goes_on}." if (
        before and before != now
    ) else ""


def _average(
    what: str, average: Average | None, state_dict: Mapping[str, Any], saved: Mapping[str, Any]
) -> tuple[bool, str]:
    """Whether the average has its own decay, and what there is to say of it."""
    before = saved.get("average")
    held = {name for entries in state_dict["state"].values() for name in _AVERAGES if name in entries}
    if average is None:
        lost = "and this optimizer has none; the average is lost: build it with the same to keep it"
        return False, f"{what} the checkpoint was saved with average={before}, {lost}." if before else ""
    now = _shown(average)
    if before is None:  # a decay in its groups may be that of a schedule; `explain` shows it
        is_other = bool(held) and average.state_name not in held
        before = " and ".join(repr(name) for name in sorted(held))
    elif before == now:
        return False, ""
    elif _kind(before) == _kind(now):
        goes_on = f"its average goes on as {now}, the one given here"
        return True, f"{what} the checkpoint was saved with average={before}; {goes_on}."
    else:
        is_other = True
    lost = "that average is lost, and this one begins anew"
    return is_other, f"{what} the checkpoint was saved with average={before}, not {now}; {lost}." if is_other else ""


def _shown(stage: Clip | Average) -> str:
    """Its class and settings: of an average those that are not the default, without its start."""
    name = type(stage).__name__
    if is_dataclass(stage) and isinstance(stage, Average):
        named = [field for field in fields(stage) if field.name not in _START]
        changed = [field.name for field in named if getattr(stage, field.name) != field.default]
        return f"{name}({', '.join(f'{each}={getattr(stage, each)!r}' for each in changed)})"
    return f"{name}()" if type(stage).__repr__ is object.__repr__ else repr(stage)


def _kind(shown: str) -> str:
    return shown.split("(")[0]
