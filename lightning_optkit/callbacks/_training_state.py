# SPDX-License-Identifier: Apache-2.0
"""A copy of all that steps have changed, to which a run can return within a fit."""

import copy
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_optkit.callbacks.gradient_clipping import GradientClipping
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.module_state import Buffers
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.weight_averaging import WeightAveraging

__all__ = ["TrainingState", "copy_state", "restore_state", "still_fits"]

# Entries of parameter groups that schedules set, and which go on with the run. Others are constant, or learned by the
# optimizer, as Prodigy's `d`.
_SCHEDULED = {"params", "lr", "initial_lr", "max_lr", "min_lr", "decay_lr", "momentum", "base_momentum", "max_momentum"}
_SCHEDULED |= {"betas", "weight_decay", "l1"}


@dataclass
class TrainingState:
    """Copies, in plain containers, so that a checkpoint can hold them.

    Attributes:
        step: The number of steps before it.
        weights: Parameters and buffers of the module, by name.
        optimizers: The optimizers' state dicts.
        callbacks: States of averages and clips, by their key.
    """

    step: int
    weights: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    callbacks: dict[str, Any]


def copy_state(trainer: pl.Trainer, pl_module: pl.LightningModule, buffers: Buffers | None) -> TrainingState:
    """The state before the next step. Loaders, random numbers, schedulers and counts of batches are no part of it.

    Args:
        trainer: The Trainer, between a backward pass and the update.
        pl_module: The module.
        buffers: What buffers held before the forward pass, which may have changed them.
    """
    tensors = _tensors(pl_module)
    if buffers is not None:
        tensors = {name: buffers.value(name, tensor) for name, tensor in tensors.items()}
    weights = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in Run(trainer).optimizers]
    callbacks = {callback.state_key: copy.deepcopy(callback.state_dict()) for callback in _learning(trainer)}
    return TrainingState(Run(trainer).step, weights, optimizers, callbacks)


@torch.no_grad()
def restore_state(trainer: pl.Trainer, pl_module: pl.LightningModule, state: TrainingState) -> None:
    """Brings weights, optimizers, averages and clips back, bit for bit; rates and what else is scheduled stay."""
    for name, tensor in _tensors(pl_module).items():
        if name in state.weights:
            tensor.copy_(state.weights[name])
    for optimizer, saved in zip(Run(trainer).optimizers, state.optimizers, strict=True):
        groups = [
            {**before, **{name: value for name, value in now.items() if name in _SCHEDULED}}
            for now, before in zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
        ]
        optimizer.load_state_dict(copy.deepcopy({**saved, "param_groups": groups}))
    for callback in _learning(trainer):
        if callback.state_key in state.callbacks:
            callback.load_state_dict(copy.deepcopy(state.callbacks[callback.state_key]))


def still_fits(trainer: pl.Trainer, state: TrainingState) -> bool:
    """Whether the optimizers and the parameters in their groups are those of the copy, by number."""
    now = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in Run(trainer).optimizers]
    return now == [[len(group["params"]) for group in saved["param_groups"]] for saved in state.optimizers]


def _tensors(pl_module: pl.LightningModule) -> dict[str, Tensor]:
    return dict(pl_module.named_parameters()) | dict(pl_module.named_buffers())


def _learning(trainer: pl.Trainer) -> list[Callback]:
    return [*callbacks_of(trainer, WeightAveraging), *callbacks_of(trainer, GradientClipping)]
