# SPDX-License-Identifier: Apache-2.0
"""The first batch of a run's data, again and again, as `optkit doctor` fits it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_optkit.callbacks.seams.overrides import override, restore
from lightning_optkit.cli.other_batch import OtherBatch

__all__ = ["one_batch"]


class _Repeated:
    """The first batch of a loader, again and again; the second is kept."""

    def __init__(self, loader: Any, count: int, other: OtherBatch) -> None:
        self._loader, self._count, self._other = loader, count, other

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        loader = self._loader
        if isinstance(loader, dict | list | tuple) or not hasattr(loader, "__iter__"):
            loader = CombinedLoader(loader, "max_size_cycle")
        batches = iter(loader)
        if isinstance(loader, CombinedLoader):  # which gives a batch with its number and that of its loader
            batches = (batch for batch, *_ in loader)
        for first in batches:
            with suppress(Exception):  # of a batch that is not fitted
                self._other.batch = next(batches, None)
            return iter([first] * self._count)
        raise ValueError("doctor: the loader of training data gives no batch; is the data set empty?")


@contextmanager
def one_batch(
    module: pl.LightningModule, loaders: Any, datamodule: Any, count: int, other: OtherBatch
) -> Iterator[dict[str, Any]]:
    """The arguments of `fit` for one batch."""
    if loaders is not None:
        yield {"train_dataloaders": _Repeated(loaders, count, other)}
        return
    source: Any = module if datamodule is None else datamodule
    original = source.train_dataloader

    def train_dataloader() -> _Repeated:
        return _Repeated(original(), count, other)

    override(source, "train_dataloader", train_dataloader)
    try:
        yield {} if datamodule is None else {"datamodule": datamodule}
    finally:
        restore(source, "train_dataloader", train_dataloader)
