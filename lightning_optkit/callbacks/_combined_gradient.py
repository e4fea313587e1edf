# SPDX-License-Identifier: Apache-2.0
"""SAM's variants that train with a combination of the gradients at the weights and at the perturbed weights."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_optkit.callbacks.sam import SAM
from lightning_optkit.callbacks.seams.lightning_packages import loss_scaler
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.second_pass import SecondPass, finish_second_passes, loss_of, with_loss
from lightning_optkit.step.shards import local, place_like

__all__ = ["CombinedGradientSAM", "Gradients", "trained_parameters", "with_gradient"]

Gradients = list[Tensor | None]


class CombinedGradientSAM(SAM):
    """Takes both gradients inside `training_step` and returns a loss whose gradient is their combination.

    So the backward pass adds it to `.grad` as any other: accumulation, DDP, loss scaling and hooks work as usual, and
    the weights are restored before.
    """

    def _combined(self, grads: Gradients, perturbed: Gradients) -> Gradients:
        """The gradient to train with, given those at the weights and at the perturbed weights."""
        raise NotImplementedError

    def _wrap_training_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[..., Any]:
        original = pl_module.training_step

        @wraps(original)  # Lightning inspects the signature
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._step(trainer, pl_module, lambda: original(*args, **kwargs))

        return training_step

    def _step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, run: Callable[[], Any]) -> Any:
        """One `training_step` with both gradients."""
        before = _RandomState(pl_module.device)
        output = run()
        loss, params = loss_of(output), trained_parameters(trainer)
        if loss is None or not params:
            return output
        grads = self._unscaled(trainer, params, loss)
        finish_second_passes(pl_module)
        self._climb(params, grads)
        before.restore()
        try:
            with SecondPass(pl_module):
                loss = loss_of(run())
            perturbed = None if loss is None else self._unscaled(trainer, params, loss)
        finally:
            self._descend()
            finish_second_passes(pl_module)
        if loss is None or perturbed is None:
            return None
        return with_loss(output, with_gradient(loss, params, self._combined(grads, perturbed)))

    def _unscaled(self, trainer: pl.Trainer, params: list[Tensor], loss: Tensor) -> Gradients:
        grads = self._gradients(trainer, params, loss)
        scaler = loss_scaler(trainer)
        scale = 1.0 if scaler is None else scaler.get_scale()
        return [None if grad is None else grad.div_(scale) for grad in grads] if scale != 1.0 else grads


def trained_parameters(trainer: pl.Trainer) -> list[Tensor]:
    """The parameters of the optimizers that are not frozen now."""
    return [param for param in Run(trainer).parameters if param.requires_grad]


class _RandomState:
    """torch's random numbers, so that both runs use the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._accelerator is not None:
            torch.get_device_module(self._device).set_rng_state(self._accelerator, self._device)


def with_gradient(loss: Tensor, params: list[Tensor], grads: Gradients) -> Tensor:
    """`loss`, with a backward pass that gives each parameter the gradient in `grads`, times that of the result."""
    result: Tensor = _WithGradient.apply(loss.detach(), grads, *params)  # type: ignore[no-untyped-call]
    return result


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: Gradients, *params: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if grad is None else _times(grad, factor) for grad in ctx.grads)


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    here = local(grad)
    return place_like(here * factor.to(here.device, here.dtype), grad)
