# SPDX-License-Identifier: Apache-2.0
"""The averages of a checkpoint and those of the run that goes on from it.

The same average goes on, wherever it stands among the callbacks, and so does one of the same kind, with the settings
given now. For one that the run leaves out, or has another kind of, there is no way to go on, and the run says so.
"""

import re
from collections import Counter
from collections.abc import Mapping
from itertools import chain, count
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.averaging import LAWA
from lightning_optkit.callbacks.seams.kept_average import KeptAverage
from lightning_optkit.callbacks.seams.left_out_average import drop_averages
from lightning_optkit.callbacks.seams.saved_stages import leave_to_callback

__all__ = ["match_averages", "name_as_saved"]

_OWNER = "WeightAveraging"
_KEY = re.compile(r"""(?P<owner>\w+)\{'average': ["'](?P<average>(?P<kind>\w+)\(.*\))["']\}""")
_NAMES = {"EMA": "ema", "PowerEMA": "power_ema", "SWA": "swa", "LAWA": "lawa"}  # without others beside it


def name_as_saved(checkpoint: dict[str, Any], given: Mapping[str, KeptAverage]) -> None:
    """Gives the averages of the run the names that they have in a checkpoint, before states of optimizers are loaded.

    Args:
        checkpoint: It is not changed.
        given: The averages of the run, by the key of their state.
    """
    saved = _all_saved(checkpoint, given)
    _rename(saved, _pairs(saved, given), given)


def match_averages(trainer: pl.Trainer, checkpoint: dict[str, Any], given: Mapping[str, KeptAverage]) -> None:
    """Moves the states of a checkpoint to the averages of the run, and warns of those that go on otherwise, or not.

    Every callback may call it when a fit loads a checkpoint, before the states are loaded: the second call finds
    nothing to do.

    Args:
        trainer: The Trainer.
        checkpoint: Its states of callbacks, and of optimizers, are changed.
        given: The averages of the run, by the key of their state.
    """
    leave_to_callback(checkpoint, "average")
    states = checkpoint.get("callbacks", {})
    name_as_saved(checkpoint, given)  # FSDP2 has done so already
    saved = _all_saved(checkpoint, given)
    pairs = _pairs(saved, given)
    for kept in (kept for key, kept in given.items() if key not in saved):
        kept.keep_settings()
    for own, key in pairs.items():
        if own != key:
            states[own] = states.pop(key)
            rank_zero_warn(
                f"{_OWNER}({given[own].average!r}): the checkpoint was saved with {saved[key].average}; its "
                "average goes on with the settings given here."
            )
    anew = " and ".join(repr(kept.average) for key, kept in given.items() if key not in pairs)
    for key, lost in saved.items():
        if key not in pairs.values():
            states.pop(key)
            drop_averages(trainer, checkpoint, [lost.name or _NAMES.get(lost.kind, "")])
            rank_zero_warn(
                f"{_OWNER}({lost.average}): the checkpoint was saved with it, and this run leaves it out; the average "
                f"is lost{f', and {anew} begins anew' if anew else ''}: give the same callback to keep it."
            )


class _Saved(NamedTuple):
    """An average of the checkpoint: its class and settings, its class alone, and its name in the state."""

    average: str
    kind: str
    name: str | None


def _all_saved(checkpoint: Mapping[str, Any], given: Mapping[str, KeptAverage]) -> dict[Any, _Saved]:
    states = checkpoint.get("callbacks", {})
    return {key: each for key in states if (each := _read(key, states[key], given)) is not None}


def _read(key: Any, state: Any, given: Mapping[str, KeptAverage]) -> _Saved | None:
    """None for the state of another callback."""
    found = _KEY.fullmatch(str(key))
    owners = {_OWNER, *(each.split("{")[0] for each in given)}
    if found is None or found["owner"] not in owners or not isinstance(state, dict) or "steps" not in state:
        return None
    name = state.get("name")
    return _Saved(found["average"], found["kind"], name if isinstance(name, str) else None)


def _pairs(saved: Mapping[Any, _Saved], given: Mapping[str, KeptAverage]) -> dict[str, Any]:
    """For averages here the key of that which they go on from: the same, else that of its kind in the same place.

    If only one of a kind is left on either side, its place does not matter.
    """
    pairs = {key: key for key in given if key in saved}
    for is_at in (lambda kept, each: kept.name == each.name, lambda kept, each: True):
        left = [key for key in saved if key not in pairs.values()]
        fresh = [own for own in given if own not in pairs]
        fitting = {own: [key for key in left if _is_of_kind(given[own], saved[key])] for own in fresh}
        fitting = {own: [key for key in keys if is_at(given[own], saved[key])] for own, keys in fitting.items()}
        claims = Counter(key for keys in fitting.values() for key in keys)
        pairs |= {own: keys[0] for own, keys in fitting.items() if len(keys) == 1 and claims[keys[0]] == 1}
    return pairs


def _is_of_kind(kept: KeptAverage, saved: _Saved) -> bool:
    return type(kept.average).__name__ == saved.kind


def _rename(saved: Mapping[Any, _Saved], pairs: Mapping[str, Any], given: Mapping[str, KeptAverage]) -> None:
    """Gives averages that go on their names in the checkpoint, and the others names that are still free.

    So the order of the callbacks does not matter, and the average that was part of the step stays so.
    """
    names = {own: saved[key].name for own, key in pairs.items()}
    # Of snapshots and of others, one each has no name.
    taken = {(isinstance(given[own].average, LAWA), name) for own, name in names.items()}
    taken |= {(each.kind == LAWA.__name__, each.name) for each in saved.values() if each.name is not None}
    for place, (own, kept) in enumerate(given.items(), start=1):
        if own not in names:
            holds, prefix = isinstance(kept.average, LAWA), kept.average.state_name
            free = chain([kept.name, None], (f"{prefix}_{number}" for number in count(place)))
            names[own] = next(name for name in free if (holds, name) not in taken)
            taken.add((holds, names[own]))
    others = [given[own] for own, name in names.items() if given[own].name != name]
    attach_again = [kept.let_go() for kept in others]  # all of them, before one takes the place of another in a step
    for kept, attach in zip(others, attach_again, strict=True):
        kept.name = names[next(own for own, each in given.items() if each is kept)]
        attach()
