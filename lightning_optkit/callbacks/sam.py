# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware minimization with automatic optimization, in every precision."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optkit._checks import check_bools, check_in
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_packages import is_a, loss_scaler
from lightning_optkit.callbacks.seams.refusals import (
    refuse_all_but_dtensors,
    refuse_manual_optimization,
    refuse_reentrant_checkpoints,
    refuse_twice,
)
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.second_pass import SecondPass, finish_second_passes, loss_of, with_loss
from lightning_optkit.regularization.asam import asam
from lightning_optkit.regularization.sam import sam
from lightning_optkit.step.shards import local, placed_like

__all__ = ["SAM"]


class SAM(FitCallback):
    """Sharpness-aware: takes every gradient at the worst point near the weights, for flat minima.

    Inside `training_step` the module runs on the batch, its gradient (kept separate from `.grad`) gives the ascent
    direction, and the module runs again with the perturbed weights. The backward pass is that of the second run, and
    right after it the weights are restored bitwise. The optimizer's step, clipping, averaging and loss scaling work as
    usual; if the first gradient overflows, the second one does too, so that the scaler skips the step.

    Both runs use the same random numbers of torch (dropout masks). The second has no side effects: BatchNorm's
    statistics, metrics and `self.log` are those of the first, at the original weights. With gradient accumulation every
    batch has its own ascent.

    Under DDP each process uses the gradient of its own batch for the ascent, as in the paper (m-sharpness), without
    additional communication; with `sync=True` all processes use the mean of their gradients. Under FSDP2
    (`ModelParallelStrategy`) it is always the mean, since no process has a whole gradient of its own batch.

    Cost: about twice the forward and backward time, and a copy of the weights.

    Args:
        rho: Radius, in (0, inf). Default: 0.05; 0.5 if `adaptive`.
        adaptive: ASAM: scale the radius by the weights.
        eta: For ASAM, added to the magnitude of a weight, in [0, inf).
        sync: Average the ascent over all processes.

    Raises:
        ValueError: for an argument out of range; when the fit starts, for manual optimization, and for a strategy
            other than a single device, DDP and FSDP2; at the first step, for activations that are checkpointed with
            `use_reentrant=True`.

    Source: Foret et al. 2021, arXiv:2010.01412, Algorithm 1; Kwon et al. 2021, arXiv:2102.11600.

    Example:
        >>> trainer = pl.Trainer(callbacks=[SAM(rho=0.05)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, rho: float | None = None, adaptive: bool = False, eta: float = 0.01, sync: bool = False) -> None:
        check_bools(type(self).__name__, adaptive=adaptive, sync=sync)
        default = 0.5 if adaptive else 0.05
        self.rho = default if rho is None else check_in(type(self).__name__, "rho", rho, "(0, inf)")
        self.eta = check_in(type(self).__name__, "eta", eta, "[0, inf)")
        self.adaptive, self.sync = adaptive, sync
        self._before: list[tuple[Tensor, Tensor]] = []  # while the weights are perturbed: parameter, original value
        self._is_checked = False

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_twice(self, trainer)
            for other in callbacks_of(trainer, SAM, but=self):
                raise ValueError(
                    f"{type(self).__name__}(...): {type(other).__name__} takes a second gradient too; a run takes one."
                )
            refuse_manual_optimization(self, pl_module, "SAM must know which backward pass belongs to which batch")
            refuse_all_but_dtensors(self, trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_a(trainer.strategy, ModelParallelStrategy) and not self.sync:
            rank_zero_info(
                f"{type(self).__name__}(sync=False): under FSDP2 the ascent is that of all processes in common."
            )
        self._is_checked = False
        # Not in setup: other wrappers of training_step apply to both runs.
        self._override(pl_module, "training_step", self._wrap_training_step(trainer, pl_module))
        self._override(pl_module, "backward", self._wrap_backward(pl_module))
        self._at_end(partial(finish_second_passes, pl_module))
        self._at_end(self._descend)

    # --- implementation ---

    def _wrap_training_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[..., Any]:
        original = pl_module.training_step
        devices = [] if pl_module.device.type == "cpu" else [pl_module.device]

        @wraps(original)  # Lightning inspects the signature
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._descend()
            with torch.random.fork_rng(devices, device_type=pl_module.device.type if devices else "cuda"):
                output = original(*args, **kwargs)
                loss = loss_of(output)
                params = [param for param in Run(trainer).parameters if param.requires_grad]
                if loss is not None and params:
                    self._climb(params, self._gradients(trainer, params, loss))
            if loss is None or not params:  # nothing is trained at all
                return output
            finish_second_passes(pl_module)  # a pair of RDrop, whose gradient has just been taken
            with SecondPass(pl_module):
                loss = loss_of(original(*args, **kwargs))
            return None if loss is None else with_loss(output, loss)

        return training_step

    def _wrap_backward(self, pl_module: pl.LightningModule) -> Callable[..., None]:
        original = pl_module.backward

        @wraps(original)
        def backward(*args: Any, **kwargs: Any) -> None:
            try:
                original(*args, **kwargs)
            finally:
                self._descend()
                finish_second_passes(pl_module)

        return backward

    def _gradients(self, trainer: pl.Trainer, params: list[Tensor], loss: Tensor) -> list[Tensor | None]:
        """Gradients at the weights as they are, scaled by the loss scale."""
        scaler = loss_scaler(trainer)
        if scaler is not None:
            loss = scaler.scale(loss)  # or small gradients would underflow in fp16; the factor has no other effect
        with torch.autocast(loss.device.type, enabled=False):
            if any(isinstance(param, DTensor) for param in params):
                return _sharded_gradients(params, loss)
            if not self._is_checked:
                refuse_reentrant_checkpoints(self, loss)
                self._is_checked = True
            found = torch.autograd.grad(loss, params, allow_unused=True)
        grads: list[Tensor | None] = [
            grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in found
        ]
        if self.sync and trainer.world_size > 1:
            return [_mean_over_processes(trainer, p, g) for p, g in zip(params, grads, strict=True)]
        return grads

    @torch.no_grad()
    def _climb(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        steps = asam(params, grads, self.rho, self.eta) if self.adaptive else sam(grads, self.rho)
        climbing = [(param, step) for param, step in zip(params, steps, strict=True) if step is not None]
        self._before = [(param, param.detach().clone()) for param, _ in climbing]
        for param, step in climbing:
            local(param).add_(local(step))

    @torch.no_grad()
    def _descend(self) -> None:
        for param, before in self._before:
            local(param).copy_(local(before))
        self._before = []

    def _forget(self) -> None:
        self._before = []


def _sharded_gradients(params: list[Tensor], loss: Tensor) -> list[Tensor | None]:
    """Those of a backward pass of its own, in which FSDP2 takes the mean over the processes; `.grad` is kept.

    FSDP2 computes with gathered copies, so the sharded parameters are not part of the graph of the loss.
    """
    kept = [param.grad for param in params]
    try:
        for param in params:
            param.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return [None if p.grad is None else placed_like(p.grad, p) for p in params]
    finally:
        for param, grad in zip(params, kept, strict=True):
            param.grad = grad


def _mean_over_processes(trainer: pl.Trainer, param: Tensor, grad: Tensor | None) -> Tensor:
    """The mean gradient; a parameter that a process does not use counts as zero there, as in DDP."""
    mean = trainer.strategy.reduce(torch.zeros_like(param) if grad is None else grad, reduce_op="mean")
    assert isinstance(mean, Tensor)
    return mean
