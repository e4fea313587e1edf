# SPDX-License-Identifier: Apache-2.0
"""Whether batches are equal since what they are made of is: zeros that stand for steps, or the whole set as an item."""

from collections.abc import Mapping, Sized
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset

from lightning_optkit.diagnostics.measure.batches import digest, tensors_of

__all__ = ["has_equal_items"]


def has_equal_items(trainer: pl.Trainer, batch: Any) -> bool:
    """Whether the first, middle and last item of each data set are equal, or, if one has no items, all of the batch.

    To be asked only where batches are equal: it reads these items, though without a trace in random states.
    """
    loaders = trainer.train_dataloader
    if isinstance(loaders, Mapping):
        loaders = [*loaders.values()]
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    if not all(map(_has_items, loaders)):
        return _has_equal_samples(batch)
    with isolate_rng():
        return all(map(_is_of_one_item, loaders))


def _has_items(loader: Any) -> bool:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return isinstance(loader.dataset, Sized) and len(loader.dataset) > 0


def _has_equal_samples(batch: Any) -> bool:
    tensors = [t for t in tensors_of(batch) if t.ndim and t.layout == torch.strided]
    return any(len(t) > 1 for t in tensors) and all(bool((t == t[:1]).all()) for t in tensors)


def _is_of_one_item(loader: DataLoader[Any]) -> bool:
    data: Any = loader.dataset
    found = set()
    for place in {0, len(data) // 2, len(data) - 1}:
        item = data[place]
        # Numbers and arrays become tensors there, too.
        found.add(digest(loader.collate_fn([item] if loader.batch_sampler is not None else item)))
    return len(found) == 1 and 0 not in found  # 0: no tensors, so nothing is known
