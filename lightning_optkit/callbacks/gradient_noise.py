# SPDX-License-Identifier: Apache-2.0
"""Annealed Gaussian noise on the gradients before every optimizer step."""

import hashlib
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from lightning_optkit._checks import check_in, check_int, check_state
from lightning_optkit._torch_private import supports_amp_scaling
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_packages import loss_scaler
from lightning_optkit.callbacks.seams.refusals import refuse_all_but_dtensors, refuse_twice
from lightning_optkit.callbacks.seams.steps import StepCounts, StepListener, watch_steps
from lightning_optkit.clipping._gradients import gradients
from lightning_optkit.regularization.gradient_noise import gradient_noise_, gradient_noise_std

__all__ = ["GradientNoise"]


class GradientNoise(FitCallback):
    r"""Adds noise of variance :math:`\eta / (1 + t)^\gamma` to the gradients of optimizer step `t`, before clipping.

    It is added once per optimizer step, to the accumulated gradient, scaled by the loss scale if a one-pass optimizer
    does the unscaling. The noise depends only on `seed` and the step: it is the same in any number of processes (DDP,
    FSDP2) and in a resumed run, and does not affect torch's own random numbers. Each optimizer has its own step count.
    A sparse gradient gets noise only in its entries.

    LBFGS evaluates the gradient several times per step. Every evaluation of a step gets the same noise, so its line
    search sees one function: the loss plus a linear term.

    Args:
        eta: Initial variance, in (0, inf); 0.01, 0.3 and 1 in the paper.
        gamma: Speed of the annealing, in [0, inf).
        seed: Seed of the noise, in [0, inf).

    Raises:
        ValueError: for an argument out of range; when the fit starts, for a strategy other than a single device,
            DDP and FSDP2.

    Cost: a pass over the gradients, and the random numbers. A loss scaler's unscaling is no longer part of a one-pass
    step.

    Source: Neelakantan et al. 2015, arXiv:1511.06807, Section 3.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GradientNoise(eta=0.3)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, eta: float = 0.01, gamma: float = 0.55, seed: int = 0) -> None:
        self.eta = check_in(type(self).__name__, "eta", eta, "(0, inf)")
        self.gamma = check_in(type(self).__name__, "gamma", gamma, "[0, inf)")
        self.seed = check_int(type(self).__name__, "seed", seed, minimum=0)
        self._steps = StepCounts()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps of each optimizer."""
        return {"steps": self._steps.to_list()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        owner = f"{type(self).__name__}.load_state_dict"
        steps = check_state(type(self).__name__, state_dict, steps=list)["steps"]
        self._steps.load([check_int(owner, "state_dict['steps']", step, minimum=0) for step in steps])

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_twice(self, trainer)
            refuse_all_but_dtensors(self, trainer)
            self._steps = StepCounts()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._at_end(watch_steps(trainer, StepListener(type(self).__name__, counts=self._count)).remove)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps.begin(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        grads = gradients(type(self).__name__, params)
        if not grads:
            return
        place = trainer.optimizers.index(optimizer)
        step = self._steps[place]
        generator = torch.Generator(grads[0].device).manual_seed(_mixed(self.seed, step, place))
        std = gradient_noise_std(step, self.eta, self.gamma)
        gradient_noise_(grads, std * _scale(trainer, optimizer), generator)

    # --- implementation ---

    def _count(self, optimizer: Optimizer, place: int) -> None:
        self._steps.add(place)


def _mixed(seed: int, step: int, place: int) -> int:
    """Combines them into one seed of 32 bits: torch's CPU generator ignores the others."""
    text = f"{seed} {step} {place}" if place else f"{seed} {step}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def _scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """The remaining factor of the gradients."""
    scaler = loss_scaler(trainer)
    if scaler is not None and supports_amp_scaling(optimizer):
        return float(scaler.get_scale())
    return 1.0
