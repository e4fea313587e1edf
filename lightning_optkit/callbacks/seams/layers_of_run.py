# SPDX-License-Identifier: Apache-2.0
"""Curves of every layer of a run: gradients, updates, activations; measured more rarely as a run goes on."""

import math

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_optkit.callbacks.seams.lightning_private import accumulates
from lightning_optkit.callbacks.seams.measured_step import MeasuredStep
from lightning_optkit.diagnostics._curve import Curve
from lightning_optkit.diagnostics._observations import Check, ParameterSeen
from lightning_optkit.diagnostics.measure.rows import EqualRows
from lightning_optkit.step.shards import reshard

__all__ = ["LayersOfRun"]

_FIRST = 4  # steps that are all measured
_SHARE = 1 / 50  # of the run so far passes between two measured steps: a picture does not show more


class LayersOfRun:
    """Writes into `curves`, by quantity and layer. `before_batch` and `after_batch` bracket every training batch.

    Args:
        trainer: The Trainer, when the training starts.
        pl_module: Its module.
        curves: The curves, which may hold values of a run that is resumed.
        every: Steps between measured ones, at least.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, curves: dict[str, dict[str, Curve]], every: int
    ) -> None:
        self._trainer, self._module, self._curves, self._every = trainer, pl_module, curves, every
        reshard(pl_module)  # the sanity check may have left parameters whole
        self._rows = EqualRows(pl_module)
        self._measured: MeasuredStep | None = None
        self._next = 0

    def before_batch(self, step: int) -> None:
        """Begins to measure after `step` steps, if it is time and the batch ends with another one."""
        self.close()
        if step + 1 >= self._next and not (self._module.automatic_optimization and accumulates(self._trainer)):
            self._measured = MeasuredStep(self._trainer, self._module, step)

    def after_step(self, optimizer: Optimizer) -> None:
        """To be called right after each step."""
        if self._measured is not None:
            self._measured.after_step(optimizer)

    def after_batch(self, step: int) -> None:
        """Keeps what was measured, if the batch ended with step number `step`."""
        if self._measured is not None and self._measured.is_taken:
            self._measured.end_of_forward()
            self._take(self._measured.check(self._rows, {}), step)
            gap = 1 if step < _FIRST else max(self._every, math.ceil(step * _SHARE))
            self._next = step + gap
        self.close()

    def close(self) -> None:
        """Removes the hooks of a measured step."""
        if self._measured is not None:
            self._measured.close()
            self._measured = None

    def _take(self, check: Check, step: int) -> None:
        layers: dict[str, list[ParameterSeen]] = {}
        for param in check.parameters:
            layers.setdefault(param.layer or param.name, []).append(param)
        for name, params in layers.items():
            grads = [param.grad_norm for param in params if math.isfinite(param.grad_norm)]
            updates = [(param.update_norm, param.weight_norm) for param in params if math.isfinite(param.update_norm)]
            if grads:
                self._append("grad_norm", name, step, math.hypot(*grads))
            weight = math.hypot(*(each for _, each in updates))
            if weight > 0:
                self._append("update_ratio", name, step, math.hypot(*(each for each, _ in updates)) / weight)
        for layer in check.layers:
            self._append("activation", layer.name, step, layer.out_rms)
        for number, activation in enumerate(check.activations):
            function = f"{activation.function} {number}"
            name = f"{activation.layer}, {function}" if activation.layer else function
            self._append("closed", name, step, activation.closed)

    def _append(self, quantity: str, layer: str, step: int, value: float) -> None:
        self._curves.setdefault(quantity, {}).setdefault(layer, Curve()).append(step, value)
