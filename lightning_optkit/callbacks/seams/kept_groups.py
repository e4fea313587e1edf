# SPDX-License-Identifier: Apache-2.0
"""The optimizers of a run, their parameter groups, and the groups' entries as they are now."""

import lightning.pytorch as pl
from torch import Tensor

__all__ = ["KeptGroups"]


class KeptGroups:
    """What `restore` puts back: a module may change rates, add a group, or set other optimizers.

    Entries are put back by the object, those that are tensors, as a rate may be, with their contents.

    Args:
        trainer: The Trainer, in a fit.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._strategy = trainer.strategy
        self._list, self._optimizers = trainer.optimizers, [*trainer.optimizers]
        self._groups = [
            (optimizer, [(group, {**group}, [*group["params"]]) for group in optimizer.param_groups])
            for optimizer in self._optimizers
        ]
        self._tensors = [
            (value, value.detach().clone())
            for _, groups in self._groups
            for _, entries, _ in groups
            for value in entries.values()
            if isinstance(value, Tensor)
        ]

    def restore(self) -> None:
        """Puts them back."""
        self._list[:] = self._optimizers
        if self._strategy.optimizers is not self._list:
            self._strategy.optimizers = self._list
        for optimizer, groups in self._groups:
            optimizer.param_groups[:] = [group for group, _, _ in groups]
            for group, entries, params in groups:
                for name in group.keys() - entries.keys():
                    del group[name]
                group.update(entries)
                group["params"][:] = params
        for t, value in self._tensors:
            t.data.copy_(value)
