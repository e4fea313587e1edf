# SPDX-License-Identifier: Apache-2.0
"""Rates that something else has written over those of a schedule, which will write its own again.

What changes the rate together with its base (`PlateauSchedule`, a batch size that grows, a finder) goes through the
schedule, and is no matter.
"""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import rank_zero_warn

from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of

__all__ = ["ForeignRates"]


class ForeignRates:
    """Warns once if a rate is another than the schedule has written; for one fit.

    Args:
        owner: The callback that schedules.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        # By identity; the groups themselves are held, so that no other one has the identity of one that is gone.
        self._written: dict[int, tuple[dict[str, Any], float, float | None]] = {}
        self._is_told = False

    def look(self, trainer: pl.Trainer) -> None:
        """To be called before the schedule writes."""
        for optimizer in () if self._is_told else trainer.optimizers:
            for group in optimizer.param_groups:
                _, rate, base = self._written.get(id(group), (group, None, None))
                if rate is None or group["lr"] == rate or group.get("initial_lr") != base:
                    continue
                self._is_told = True
                suspects = [type(each).__name__ for each in callbacks_of(trainer, BaseFinetuning)]
                rank_zero_warn(
                    f"{self._owner}: something else{_such_as(suspects)} has set the lr of a group of "
                    f"{type(optimizer).__name__} to {float(group['lr']):.3g}, and it is {rate:.3g} again: the schedule "
                    "writes it at every step. Keep one of the two."
                )
                return

    def keep(self, trainer: pl.Trainer) -> None:
        """To be called after the schedule has written."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        # A rate that is a tensor may be on a device, where a look at each batch would wait for it.
        self._written = {
            id(group): (group, group["lr"], group.get("initial_lr"))
            for group in groups
            if isinstance(group.get("lr"), float | int)
        }


def _such_as(suspects: list[str]) -> str:
    return f" ({suspects[0]}?)" if suspects else ""
