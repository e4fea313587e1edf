# SPDX-License-Identifier: Apache-2.0
"""The gradient norms of a run, before and after clipping.

A norm is obtained without an extra read of the gradients where possible:

- A one-pass optimizer with a clip by norm has already computed it: it is read after every step, at no cost.
- For any other, `on_after_backward` reads the gradients before clipping (still scaled with 16-mixed, so divided by the
  loss scale here), and a hook after the optimizer's step reads them after clipping. Both cost a pass over the
  gradients, so they run only every few steps.
- `on_before_optimizer_step` is not used, since `Fuse` would then keep the loss scaler's own pass; nor an override of
  `configure_gradient_clipping`, which `Fuse` would take for a module that clips itself; nor a hook before the
  optimizer's step, since Lightning runs the forward and backward pass inside the step, after that hook.
"""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit._norms import total_norm
from lightning_optkit.callbacks._pending_values import PendingValues, curve_of
from lightning_optkit.callbacks.seams.lightning_packages import is_overridden
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.diagnostics.report import RunRecord
from lightning_optkit.step import OnePassOptimizer

__all__ = ["GradientNorms"]


class GradientNorms:
    """Those of every step if the optimizer has them, else of some.

    Args:
        trainer: The Trainer, when the training starts.
        record: Where they are recorded.
        values: Takes those that are on an accelerator.
        every: Steps between measurements.
    """

    def __init__(self, trainer: pl.Trainer, record: RunRecord, values: PendingValues, every: int) -> None:
        module = trainer.lightning_module
        self._record, self._values, self._every = record, values, every
        self._clips = bool(trainer.gradient_clip_val) or is_overridden("configure_gradient_clipping", module)
        self._clips |= not module.automatic_optimization

    def after_backward(self, trainer: Any, names: Mapping[Optimizer, str], batch_idx: int) -> None:
        """Measures the gradients of the batch that completes a step, before they are clipped.

        Args:
            trainer: The Trainer.
            names: Of the optimizers.
            batch_idx: Of the batch, in its epoch.
        """
        if not (trainer.lightning_module.automatic_optimization and trainer.optimizers and self._is_due(trainer)):
            return
        steps_now = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        optimizer = trainer.optimizers[0]
        if steps_now and optimizer in names and not _knows_norm(optimizer):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            norm = _grad_norm(optimizer, 1.0 if scaler is None else 1.0 / scaler.get_scale())
            self._values.append(curve_of(self._record.grad_norm, names[optimizer]), trainer.global_step + 1, norm)

    def after_step(self, trainer: pl.Trainer, optimizer: Optimizer, name: str, step: int) -> None:
        """Records what a step of this optimizer knows, or measures its gradients, which are clipped by now."""
        record = self._record
        if isinstance(optimizer, OnePassOptimizer) and _knows_norm(optimizer):
            self._values.append(curve_of(record.grad_norm, name), step, optimizer.grad_norm)
            self._values.append(curve_of(record.grad_norm_clipped, name), step, optimizer.grad_norm_clipped)
        elif self._clips and self._is_due(trainer) and not _clips_itself(optimizer):
            self._values.append(curve_of(record.grad_norm_clipped, name), step, _grad_norm(optimizer, 1.0))

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return Run(trainer).step % self._every == 0


def _knows_norm(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, OnePassOptimizer) and optimizer.clip is not None and optimizer.clip.needs_norm


def _clips_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer clips itself: its gradients are then unclipped."""
    return isinstance(optimizer, OnePassOptimizer) and optimizer.clip is not None


@torch.no_grad()
def _grad_norm(optimizer: Optimizer, factor: float) -> Tensor | None:
    """Global L2 norm of the current gradients, times `factor`; sharded ones are summed over all ranks."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return None
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    return total_norm(dense) * factor
