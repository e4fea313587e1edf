# SPDX-License-Identifier: Apache-2.0
"""Changes the batch size of an existing loader, and computes the resulting lengths of a run."""

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from torch.utils.data import BatchSampler, DataLoader

from lightning_optkit.callbacks.scheduling.scheduled_callback import ScheduledCallback
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.lightning_private import limited_batches, replace_argument

__all__ = ["batches_in_epoch", "check_clocks", "check_epochs", "check_resizable", "set_batch_size"]


def check_resizable(owner: str, loader: Any) -> DataLoader[Any]:
    """Returns the loader if its batch size can be changed.

    Args:
        owner: Call named in the error message.
        loader: The result of `train_dataloader`.

    Raises:
        ValueError: if it creates batches in a custom way; the message says what to do.
    """
    if not isinstance(loader, DataLoader):
        obstacle = f"{type(loader).__name__}, which is no DataLoader"
    elif loader.batch_sampler is None:
        obstacle = "DataLoader(batch_size=None), whose dataset makes the batches"
    elif type(loader.batch_sampler) is not BatchSampler:
        obstacle = f"{type(loader.batch_sampler).__name__}, a batch_sampler with rules of its own"
    elif loader.batch_size is None:
        obstacle = "DataLoader(batch_sampler=BatchSampler(...)), which has none of its own"
    else:
        return loader
    raise ValueError(
        f"{owner}: the batch size of {obstacle}, cannot be changed from outside; "
        "give one DataLoader with batch_size=... (and sampler=..., if you need one) in place of it."
    )


def set_batch_size(loader: DataLoader[Any], size: int) -> None:
    """Changes a loader in place, including the arguments from which Lightning recreates it."""
    assert isinstance(loader.batch_sampler, BatchSampler)
    loader.batch_sampler.batch_size = size
    loader.__dict__["batch_size"] = size  # DataLoader itself refuses the assignment
    replace_argument(loader, "batch_size", size)


def batches_in_epoch(owner: str, trainer: pl.Trainer, loader: DataLoader[Any]) -> float:
    """Batches per epoch at the loader's current size, after `limit_train_batches`.

    Raises:
        ValueError: if there are none.
    """
    length = sized_len(loader)
    if length == 0:
        raise ValueError(
            f"{owner}: with batch size {loader.batch_size} and drop_last=True an epoch has no batch; "
            "choose smaller sizes or drop_last=False."
        )
    limit = trainer.limit_train_batches
    return limited_batches(math.inf if length is None else length, limit)


def check_epochs(owner: str, trainer: pl.Trainer, loader: DataLoader[Any], sizes: Sequence[int]) -> list[float]:
    """Batches of each epoch of the run; every epoch must have at least one batch and a validation.

    Args:
        owner: Call named in error messages.
        trainer: The Trainer of the run.
        loader: Its training loader as created by Lightning; its size is not changed.
        sizes: The batch size of each epoch.

    Raises:
        ValueError: if an epoch has no batch, or is too short for `val_check_interval`.
    """
    present, batches = loader.batch_size, {}
    assert present is not None
    try:
        for size in sizes:
            if size not in batches:
                set_batch_size(loader, size)
                batches[size] = batches_in_epoch(owner, trainer, loader)
    finally:
        set_batch_size(loader, present)
    interval = trainer.val_check_interval
    validates = trainer.limit_val_batches > 0 and trainer.check_val_every_n_epoch is not None
    for epoch, size in enumerate(sizes):
        if validates and isinstance(interval, int) and batches[size] < interval:
            raise ValueError(
                f"{owner} and Trainer(val_check_interval={interval}): epoch {epoch} has {batches[size]} batches and "
                "would not be validated; give a float, a fraction of the epoch, or check_val_every_n_epoch=None."
            )
    return [batches[size] for size in sizes]


def check_clocks(owner: str, trainer: pl.Trainer, samples: Sequence[float]) -> None:
    """Raises if there is a schedule that assumes all epochs to be as long as the first.

    Args:
        owner: Call named in the error message.
        trainer: The Trainer of the run.
        samples: Number of samples of each epoch.
    """
    for other in callbacks_of(trainer, ScheduledCallback):
        clock, name = other._clock, type(other).__name__
        wrong_total = clock.interval == "step" or trainer.max_steps != -1
        wrong_total |= clock.interval == "sample" and len(set(samples)) > 1
        if clock.interval == "fractional_epoch" or (wrong_total and clock._given is None):
            raise ValueError(
                f"{owner} and {name}(interval={clock.interval!r}): the epochs of this run differ in length, and "
                f"{name} takes all for as long as the first; count in 'sample' or 'epoch', or give {name}(total=...)."
            )
