# SPDX-License-Identifier: Apache-2.0
"""The slow part of the gradients, amplified before every optimizer step."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit._checks import check_in, check_state, check_tensor
from lightning_optkit._torch_private import supports_amp_scaling
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_packages import loss_scaler
from lightning_optkit.callbacks.seams.refusals import refuse_all_but_dtensors, refuse_twice
from lightning_optkit.callbacks.seams.steps import StepListener, watch_steps
from lightning_optkit.regularization.grokfast import grokfast_
from lightning_optkit.step.shards import distribute_like, unsharded

__all__ = ["Grokfast"]


class Grokfast(FitCallback):
    r"""Adds :math:`\lambda` times an exponential average of the gradients to them, in every step and before clipping.

    It works with any optimizer. The average takes the accumulated gradient of each step that is really taken, without a
    loss scale: one that overflows leaves no trace. The averages are saved. A rate for it is about `1 + lamb` times
    smaller.

    Args:
        alpha: Decay rate of the average, in [0, 1).
        lamb: Weight of the average, in [0, inf).

    Raises:
        ValueError: for an argument out of range; when the fit starts, for a strategy other than a single
            device, DDP and FSDP2; at a step, for a sparse gradient.

    Cost: 4 bytes per parameter, 8 while a step is taken, and a pass over the gradients.

    Source: Lee et al. 2024, arXiv:2405.20233, Algorithm 2.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Grokfast(alpha=0.98, lamb=2.0)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, alpha: float = 0.98, lamb: float = 2.0) -> None:
        self.alpha = check_in(type(self).__name__, "alpha", alpha, "[0, 1)")
        self.lamb = check_in(type(self).__name__, "lamb", lamb, "[0, inf)")
        if self.lamb > torch.finfo(torch.float32).max:
            raise ValueError(f"{type(self).__name__}(lamb={lamb!r}): lamb must be a number that fp32 can hold.")
        self._averages: dict[str, Tensor] = {}  # by the name of the parameter
        self._next: dict[int, dict[str, Tensor]] = {}  # those of a step that may be skipped, by optimizer

    def state_dict(self) -> dict[str, Any]:
        """The average gradient of each parameter."""
        return {"averages": {name: unsharded(average) for name, average in self._averages.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        owner = f"{type(self).__name__}.load_state_dict"
        averages = check_state(type(self).__name__, state_dict, averages=dict)["averages"]
        for name, average in averages.items():
            check_tensor(owner, f"state_dict['averages'][{name!r}]", average, "inexact")
        self._averages = dict(averages)

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_twice(self, trainer)
            refuse_all_but_dtensors(self, trainer)
            self._averages = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._at_end(watch_steps(trainer, StepListener(type(self).__name__, counts=self._keep)).remove)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        updated = {id(param) for group in optimizer.param_groups for param in group["params"]}
        named = {
            name: param.grad
            for name, param in pl_module.named_parameters()
            if id(param) in updated and param.grad is not None
        }
        for name, grad in named.items():
            if grad.is_sparse:
                raise ValueError(f"{type(self).__name__}(...): the gradient of {name!r} is sparse; its average is not.")
        averages = [self._average_of(name, grad) for name, grad in named.items()]
        scaler = loss_scaler(trainer)
        scale = float(scaler.get_scale()) if scaler is not None and supports_amp_scaling(optimizer) else 1.0
        new = grokfast_(list(named.values()), averages, self.alpha, self.lamb, scale)
        self._next[trainer.optimizers.index(optimizer)] = dict(zip(named, new, strict=True))

    # --- implementation ---

    def _average_of(self, name: str, grad: Tensor) -> Tensor | None:
        """Placed like the gradient; a checkpoint has it whole."""
        average = self._averages.get(name)
        return None if average is None else distribute_like(average.to(grad.device), grad)

    def _keep(self, optimizer: Optimizer, place: int) -> None:
        self._averages.update(self._next.pop(place, {}))

    def _forget(self) -> None:
        self._next = {}
