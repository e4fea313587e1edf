# SPDX-License-Identifier: Apache-2.0
"""The averages of a checkpoint and those of the run that goes on from it.

An average of the same kind at the same place goes on, with the settings given now. For one that the run leaves out, or
has another kind of, there is no way to go on, and the run says so.
"""

import re
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.callbacks.seams.kept_average import KeptAverage
from lightning_optkit.callbacks.seams.left_out_average import drop_averages
from lightning_optkit.callbacks.seams.saved_stages import leave_to_callback

__all__ = ["match_averages"]

_OWNER = "WeightAveraging"
_KEY = re.compile(r"""(?P<owner>\w+)\{'average': ["'](?P<average>(?P<kind>\w+)\(.*\))["']\}""")
_NAMES = {"EMA": "ema", "PowerEMA": "power_ema", "SWA": "swa", "LAWA": "lawa"}  # without others beside it


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
    fresh = {key: kept for key, kept in given.items() if key not in states}
    for kept in fresh.values():
        kept.keep_settings()
    lost: list[tuple[str, str]] = []
    for key in [key for key in states if key not in given]:
        found, state = _KEY.fullmatch(str(key)), states[key]
        if found is None or found["owner"] not in _owners(given) or not isinstance(state, dict) or "steps" not in state:
            continue
        states.pop(key)
        name = state.get("name")
        place = next((own for own, kept in fresh.items() if _goes_on(kept, found["kind"], name)), None)
        if place is None:
            lost.append((found["average"], name or _NAMES.get(found["kind"], "")))
        else:
            states[place] = state
            rank_zero_warn(
                f"{_OWNER}({fresh.pop(place).average!r}): the checkpoint was saved with {found['average']}; its "
                "average goes on with the settings given here."
            )
    for average, name in lost:
        drop_averages(trainer, checkpoint, [name])
        anew = " and ".join(repr(kept.average) for kept in fresh.values())
        rank_zero_warn(
            f"{_OWNER}({average}): the checkpoint was saved with it, and this run leaves it out; the average is lost"
            f"{f', and {anew} begins anew' if anew else ''}: give the same callback to keep it."
        )


def _owners(given: Mapping[str, KeptAverage]) -> set[str]:
    return {_OWNER, *(key.split("{")[0] for key in given)}


def _goes_on(kept: KeptAverage, kind: str, name: object) -> bool:
    return type(kept.average).__name__ == kind and kept.name == name
