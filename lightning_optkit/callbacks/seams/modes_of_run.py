# SPDX-License-Identifier: Apache-2.0
"""When dropout layers leave training mode within a run: the steps from there on are worth measuring."""

from torch import nn

from lightning_optkit.diagnostics.measure.modules import drops

__all__ = ["ModesOfRun"]

_STEPS = 3  # as many as the rule asks for
_CHANGES = 4  # in one fit: a module that goes back and forth in every epoch is then left to the regular steps


class ModesOfRun:
    """The dropout layers below `root`, in one fit; a layer that is added later is not watched."""

    def __init__(self, root: nn.Module) -> None:
        self._layers = [module for module in root.modules() if drops(module)]
        self.has_any = bool(self._layers)
        self._num_training = self._count()
        self.is_training = self._num_training > 0  # some layer, as the fit starts
        self._num_changes, self._until = 0, 0

    def is_due(self, step: int) -> bool:
        """Whether a layer has left training mode within the last steps; to be asked before every batch."""
        before, self._num_training = self._num_training, self._count()
        if self._num_training < before and self._num_changes < _CHANGES:
            self._num_changes += 1
            self._until = step + _STEPS
        return step < self._until

    def _count(self) -> int:
        return sum(layer.training for layer in self._layers)
