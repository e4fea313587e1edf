# SPDX-License-Identifier: Apache-2.0
"""BatchNorm's running statistics for weights that no training step has used."""

import copy
import inspect
from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from lightning_optkit._torch_private import AnyBatchNorm, forget_iterator
from lightning_optkit.callbacks.seams.lightning_packages import twins

__all__ = ["batch_norms", "check_batch", "check_forward", "recompute_batch_norm_"]


def check_forward(owner: str, pl_module: pl.LightningModule) -> None:
    """Raises ValueError if the module has BatchNorm, but no forward of a single input."""
    if not batch_norms(pl_module):
        return
    name = type(pl_module).__name__
    undefined = [base.forward for base in twins(pl.LightningModule)]
    if type(pl_module).forward in undefined and "forward" not in vars(pl_module):
        raise ValueError(f"{owner}(update_bn=True): {name} must define forward(x), for the first item of a batch.")
    signature = inspect.signature(pl_module.forward)
    try:
        signature.bind("x")
    except TypeError:
        raise ValueError(
            f"{owner}(update_bn=True): {name}.forward{signature} must do with the first item of a batch alone; give "
            "its other arguments defaults, or leave update_bn out."
        ) from None


def check_batch(owner: str, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
    """Raises ValueError if the module has BatchNorm, and its `forward` fails on a batch that has no first item."""
    if isinstance(batch, Tensor | list | tuple) or not batch_norms(pl_module):
        return
    modes = {module: module.training for module in pl_module.modules()}
    try:
        pl_module.eval()
        with isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context():
            pl_module(batch)
    except Exception as error:
        raise ValueError(
            f"{owner}(update_bn=True): {type(pl_module).__name__}.forward is given each batch as it is, a "
            f"{type(batch).__name__}, and fails on it ({error}); let it take such a batch, return tuples from the "
            "dataset, or leave update_bn out."
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


def batch_norms(pl_module: pl.LightningModule) -> dict[str, Tensor]:
    """The running statistics and counters of all BatchNorm layers, by name."""
    return {
        f"{name}.{buffer_name}" if name else buffer_name: buffer
        for name, module in pl_module.named_modules()
        if isinstance(module, AnyBatchNorm)
        for buffer_name, buffer in module.named_buffers(recurse=False)
    }


def recompute_batch_norm_(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """`torch.optim.swa_utils.update_bn` over the training data, merged over the processes, without other side effects.

    Random numbers, the position in the training data, other buffers and training modes are unchanged; a frozen
    BatchNorm gets new statistics too, since its input has changed.
    """
    statistics = batch_norms(pl_module)
    if not statistics:
        return
    others = {name: b.clone() for name, b in pl_module.named_buffers() if name not in statistics}
    modes = {module: module.training for module in pl_module.modules()}
    momenta = {module: module.momentum for module in modes if isinstance(module, AnyBatchNorm)}
    try:
        with isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context():
            update_bn(_inputs(trainer), pl_module)
    finally:
        for module, training in modes.items():
            module.training = training
        for module, momentum in momenta.items():
            module.momentum = momentum
        for name, buffer in pl_module.named_buffers():
            if name in others:
                buffer.copy_(others[name])
    if trainer.world_size > 1:
        for buffer in statistics.values():
            if buffer.dtype.is_floating_point:
                buffer.copy_(trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))


def _inputs(trainer: pl.Trainer) -> Iterator[Any]:
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"WeightAveraging(update_bn=True): the training data must be one DataLoader, got {type(loader).__name__}."
        )
    # Training continues with its own iterator (persistent workers would restart it) and its own order.
    again = copy.copy(loader)
    forget_iterator(again)
    holders = [again, again.sampler, getattr(again.batch_sampler, "sampler", None)]
    generators = {g for holder in holders if (g := getattr(holder, "generator", None)) is not None}
    states = {generator: generator.get_state() for generator in generators}
    limit = trainer.num_training_batches
    try:
        for batch in islice(iter(again), None if limit == float("inf") else int(limit)):
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            yield batch[0] if isinstance(batch, list | tuple) else batch
    finally:
        for generator, state in states.items():
            generator.set_state(state)
