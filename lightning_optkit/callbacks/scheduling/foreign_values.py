# SPDX-License-Identifier: Apache-2.0
"""Values that something else has written over those of a schedule, which will write its own again.

What changes a value together with its base (`PlateauSchedule`, a batch size that grows, a finder) goes through the
schedule, and is no matter.
"""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from lightning_optkit.callbacks.scheduling.group_targets import groups_with
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of

__all__ = ["ForeignValues"]


class ForeignValues:
    """Warns once if an entry of a group is another than the schedule has written; for one fit.

    Args:
        owner: The callback that schedules.
        name: Of the entry, normalized: "lr" or "betas[0]".
    """

    def __init__(self, owner: str, name: str) -> None:
        self._owner, self._name = owner, name
        # By identity; the groups themselves are held, so that no other one has the identity of one that is gone.
        self._written: dict[int, tuple[dict[str, Any], float, float | None]] = {}
        self._is_told = False

    def look(self, trainer: pl.Trainer) -> None:
        """To be called before the schedule writes."""
        for optimizer in () if self._is_told else trainer.optimizers:
            for _, group, value in groups_with(optimizer, self._name):
                _, written, base = self._written.get(id(group), (group, None, None))
                if written is None or value == written or self._base(group) != base or base == 0:  # 0 is taken anew
                    continue
                self._tell(trainer, type(optimizer).__name__, value, written)
                return

    def keep(self, trainer: pl.Trainer) -> None:
        """To be called after the schedule has written."""
        # A value that is a tensor may be on a device, where a look at each batch would wait for it.
        self._written = {
            id(group): (group, value, self._base(group))
            for optimizer in trainer.optimizers
            for _, group, value in groups_with(optimizer, self._name)
            if not isinstance(value, Tensor)
        }

    def _base(self, group: dict[str, Any]) -> float | None:
        return group.get(f"initial_{self._name}")

    def _tell(self, trainer: pl.Trainer, optimizer: str, value: float, written: float) -> None:
        self._is_told = True
        suspects: list[Any] = callbacks_of(trainer, BaseFinetuning)
        if self._name != "lr":
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            suspects = [each for each in schedulers if isinstance(each, OneCycleLR | CyclicLR)]  # cycle_momentum
        such_as = f" ({type(suspects[0]).__name__}?)" if suspects else ""
        rank_zero_warn(
            f"{self._owner}: something else{such_as} has set the {self._name} of a group of {optimizer} to "
            f"{value:.3g}, and it is {written:.3g} again: the schedule writes it at every step. Keep one of the two."
        )
