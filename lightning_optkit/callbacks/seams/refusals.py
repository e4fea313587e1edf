# SPDX-License-Identifier: Apache-2.0
"""Errors that several callbacks raise with the same wording."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor

from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.lightning_packages import is_a

__all__ = [
    "refuse_all_but_dtensors",
    "refuse_listed_twice",
    "refuse_manual_optimization",
    "refuse_reentrant_checkpoints",
    "refuse_split_parameters",
    "refuse_twice",
]


def refuse_twice(callback: Callback, trainer: pl.Trainer) -> None:
    """Raises ValueError if another callback of the same class is in the Trainer."""
    owner = type(callback).__name__
    if any(type(other) is type(callback) for other in callbacks_of(trainer, type(callback), but=callback)):
        raise ValueError(f"{owner}(...): given twice; a run takes one.")


def refuse_listed_twice(callback: Callback, trainer: pl.Trainer) -> None:
    """Raises ValueError if the Trainer contains this object twice, although it may contain several of its class."""
    if any(other is callback for other in callbacks_of(trainer, type(callback), but=callback)):
        raise ValueError(f"{type(callback).__name__}(...): the same object is given twice; list it once.")


def refuse_manual_optimization(callback: Callback, pl_module: pl.LightningModule, because: str) -> None:
    """Raises ValueError if the module uses manual optimization."""
    if not pl_module.automatic_optimization:
        owner = type(callback).__name__
        raise ValueError(f"{owner}(...): {type(pl_module).__name__} optimizes manually; {because}.")


def refuse_reentrant_checkpoints(callback: Callback, loss: Tensor) -> None:
    """Raises ValueError if activations of `loss` are checkpointed by a backward pass inside the backward pass.

    `torch.autograd.grad` does not reach the parameters inside: they would have no gradient, without an error.
    """
    seen: set[object] = set()
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                f"{type(callback).__name__}(...): activations are checkpointed with use_reentrant=True, which hides "
                "the gradients of the layers inside; pass use_reentrant=False to torch.utils.checkpoint, or "
                "gradient_checkpointing_kwargs={'use_reentrant': False} to a model of transformers."
            )
        nodes += [following for following, _ in node.next_functions]


def refuse_split_parameters(callback: Callback, trainer: pl.Trainer) -> None:
    """Raises ValueError for a strategy whose processes do not hold all parameters."""
    if not is_a(trainer.strategy, SingleDeviceStrategy, DDPStrategy):
        raise ValueError(
            f"{type(callback).__name__}(...): {type(trainer.strategy).__name__} is not supported; every process must "
            "hold all parameters, as on a single device or under DDP."
        )


def refuse_all_but_dtensors(callback: Callback, trainer: pl.Trainer) -> None:
    """Raises ValueError for a strategy that splits parameters otherwise than into DTensors (FSDP1, DeepSpeed)."""
    if not is_a(trainer.strategy, SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy):
        raise ValueError(
            f"{type(callback).__name__}(...): {type(trainer.strategy).__name__} is not supported; parameters must be "
            "whole, or sharded by ModelParallelStrategy (FSDP2)."
        )
