# SPDX-License-Identifier: Apache-2.0
"""When an average starts: at an optimizer step, at an epoch, or after a fraction of the run."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from lightning_optkit._checks import check_in, check_one_of, shown

if TYPE_CHECKING:
    from lightning_optkit.averaging.ema import EMA
    from lightning_optkit.averaging.lawa import LAWA
    from lightning_optkit.averaging.power_ema import PowerEMA
    from lightning_optkit.averaging.swa import SWA

    _Average = TypeVar("_Average", EMA, PowerEMA, SWA, LAWA)

__all__ = ["StartInterval", "check_start", "started_in_run"]

StartInterval: TypeAlias = Literal["step", "epoch"]
"""What an int `start` counts."""


def check_start(owner: str, start: int | float, interval: str) -> None:
    """Raises unless `start` is a step or an epoch from 1, or a fraction of the run."""
    check_one_of(owner, "start_interval", interval, ("step", "epoch"))
    requirement = "start must be an int >= 1 (optimizer step) or a float in (0, 1] (fraction of the run)."
    if interval == "epoch":
        requirement = "start must be an int >= 1 with start_interval='epoch'."
    call = f"{owner}(start={shown(start)})"
    if not isinstance(start, int | float) or isinstance(start, bool):
        raise TypeError(f"{call}: {requirement}")
    in_range = 0 < start <= 1 and interval == "step" if isinstance(start, float) else 1 <= start < 2**63
    if not in_range:
        raise ValueError(f"{call}: {requirement}")


def started_in_run(average: "_Average", total_steps: float, steps_per_epoch: float | None) -> "_Average":
    """The same average with `start` as an optimizer step; see `SWA.for_run`."""
    owner = type(average).__name__
    if average.start_interval == "epoch":
        length: Any = 0 if steps_per_epoch is None else steps_per_epoch
        check_in(f"{owner}.for_run", "steps_per_epoch", length, "[0, inf]")
        if not 1 <= length < 2**63:
            raise ValueError(
                f"{owner}(start={average.start!r}, start_interval='epoch'): start must be an optimizer step where the "
                f"length of an epoch is unknown, got steps_per_epoch={steps_per_epoch!r}."
            )
        return replace(average, start=int(average.start - 1) * math.ceil(length) + 1, start_interval="step")
    if isinstance(average.start, int):
        return average
    check_in(f"{owner}.for_run", "total_steps", total_steps, "[0, inf]")
    if not 1 <= total_steps < 2**63:
        raise ValueError(
            f"{owner}(start={average.start!r}): start must be an optimizer step where the length of the run is "
            f"unknown, got total_steps={total_steps!r}."
        )
    return replace(average, start=max(1, math.ceil(round(average.start * total_steps, 6))))
