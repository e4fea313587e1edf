# SPDX-License-Identifier: Apache-2.0
"""One batch of a run during which modules, gradients and updates are measured."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_optkit._torch_private import supports_amp_scaling
from lightning_optkit.callbacks.seams.lightning_packages import loss_scaler
from lightning_optkit.callbacks.seams.lightning_private import is_compiled
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.schedules_of_run import highest_rate
from lightning_optkit.diagnostics._observations import Check
from lightning_optkit.diagnostics.measure.modules import CalledModules
from lightning_optkit.diagnostics.measure.parameters import StepMeasure
from lightning_optkit.diagnostics.measure.rows import EqualRows

__all__ = ["MeasuredStep"]


class MeasuredStep:
    """Created before a batch that ends with a step; `close` must be called after it.

    Hooks would make torch.compile compile anew, so the modules of a compiled module are not watched.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        self._trainer, self._step, self._rate = trainer, step, float("nan")
        self.is_taken = False  # whether an optimizer has stepped
        self._params: dict[str, Tensor] = {n: p for n, p in pl_module.named_parameters() if not is_lazy(p)}
        self._norms = StepMeasure(self._params, Run(trainer).optimizers)
        self._modules = None if is_compiled(pl_module) else CalledModules(pl_module)

    def after_step(self, optimizer: Optimizer) -> None:
        """Measures a step of an optimizer."""
        self.is_taken = True
        scaler: Any = loss_scaler(self._trainer)
        is_scaled = scaler is not None and supports_amp_scaling(optimizer)
        self._norms.after(optimizer, float(scaler.get_scale()) if is_scaled else 1.0)
        self._rate = max(self._rate, highest_rate(optimizer)) if self._rate == self._rate else highest_rate(optimizer)

    @property
    def called(self) -> set[str]:
        """Names of the modules that were called."""
        return set() if self._modules is None else set(self._modules.calls)

    @property
    def without_grad(self) -> set[str]:
        """Names of those that were called under `torch.no_grad()`."""
        return set() if self._modules is None else self._modules.without_grad

    def check(self, rows: EqualRows) -> Check:
        """What was measured; to be asked before gradients are cleared."""
        modules = () if self._modules is None else tuple(self._modules.calls.values())
        return Check(self._step, self._rate, self._norms.seen(), rows.seen(self._params), modules)

    def close(self) -> None:
        """Removes hooks; no-op the second time."""
        self._norms.close()
        if self._modules is not None:
            self._modules.close()
