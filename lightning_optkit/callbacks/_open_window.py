# SPDX-License-Identifier: Apache-2.0
"""The gradients that a process has accumulated for its next step."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_optkit._torch_private import local_shard

__all__ = ["gradients_of", "mean_gradients", "set_gradients"]

Gradients = dict[str, dict[str, Any]]  # by the parameter's name: the part that this process has, and the shape of all


def gradients_of(pl_module: pl.LightningModule) -> Gradients:
    """Copies on the CPU: they are sent to the process that writes them."""
    named = [(name, param.grad) for name, param in pl_module.named_parameters() if param.grad is not None]
    return {
        name: {"part": _local(grad).detach().to("cpu", copy=True), "shape": tuple(grad.shape)} for name, grad in named
    }


def set_gradients(pl_module: pl.LightningModule, gradients: Gradients) -> None:
    """Gives the parameters these gradients; parts from another number of shards fit none."""
    fits = True
    for name, param in pl_module.named_parameters():
        if name in gradients:
            grad, part = torch.zeros_like(param), gradients[name]["part"]
            if _local(grad).shape == part.shape:
                _local(grad).copy_(part)
                param.grad = grad
            else:
                fits = False
    if not fits:
        _warn()


def mean_gradients(processes: list[Gradients]) -> Gradients:
    """The gradients that a step of all processes would use; those of several shards are not put together."""
    means = {}
    for name, first in processes[0].items():
        parts = [each[name]["part"] for each in processes if name in each]
        if len(parts) == len(processes) and all(part.shape == first["shape"] for part in parts):
            means[name] = {**first, "part": torch.stack(parts).mean(0)}
    if len(means) < len(processes[0]):
        _warn()
    return means


def _warn() -> None:
    rank_zero_warn("ExactResume: the first step misses the gradients of its batches from before the checkpoint.")


def _local(tensor: Tensor) -> Tensor:
    return local_shard(tensor) if hasattr(tensor, "to_local") else tensor
