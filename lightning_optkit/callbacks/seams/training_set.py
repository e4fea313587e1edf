# SPDX-License-Identifier: Apache-2.0
"""Reads the training set of a Trainer independently of the run: no random number of the run is used, no sampler padded.

Lightning's own loaders are not used: they repeat rows so that all ranks have equally many, and creating one draws a
random number. The loader (or loaders) of `train_dataloader` is used unmodified, and every row is read once:

- A DataLoader over all of a dataset, or over the subset of a SubsetRandomSampler: in order, each rank its share.
- Any other sampler or batch sampler: its indices of one epoch, each rank its share of the batches.
- An IterableDataset or a custom iterable may split by rank itself: every rank reads all of it.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import islice, zip_longest
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import Progress
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_optkit._torch_private import tree_flatten, tree_unflatten
from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.lightning_private import reads_in_turn, train_source

__all__ = ["TrainingSet"]

_SILENT_SECONDS = 1.0


class TrainingSet:
    """The batches of the training set, re-iterable; each rank gets its share.

    Args:
        owner: Callback named in error messages.
        trainer: The Trainer, during a fit, with processes and data set up.
        transfer: Maps a collated batch to the wanted value.
        progress: Whether to show a progress bar if reading takes longer than a second.

    Raises:
        ValueError: if the training data can be read only once.
    """

    def __init__(
        self, owner: str, trainer: pl.Trainer, transfer: Callable[[Any], Any], *, progress: bool = False
    ) -> None:
        self._owner, self._transfer = owner, transfer
        self._rank, self._world_size = trainer.global_rank, trainer.world_size
        self._progress = progress and trainer.is_global_zero
        with isolate_rng():
            loaders = train_source(trainer).dataloader()
        self._in_turn = is_a(loaders, CombinedLoader) and reads_in_turn(loaders)
        self._loaders, self._structure = tree_flatten(loaders.iterables if is_a(loaders, CombinedLoader) else loaders)
        for loader in self._loaders:
            if isinstance(loader, Iterator):
                raise ValueError(
                    f"{owner}(train_dataloaders={type(loader).__name__}): the training data must be readable more than "
                    "once; pass a DataLoader or another iterable instead of an iterator."
                )

    def __iter__(self) -> Iterator[Any]:
        """The batches of this rank, transferred."""
        with _beside(self._loaders):
            torch.manual_seed(0)  # a sampler must draw the same on all ranks
            shares = [_share(loader, self._rank, self._world_size) for loader in self._loaders]
            if self._in_turn:
                batches: Iterable[Any] = (batch for share in shares for batch in share)
            elif len(shares) == 1:
                batches = (tree_unflatten([batch], self._structure) for batch in shares[0])
            else:
                batches = (tree_unflatten([*row], self._structure) for row in zip_longest(*shares))
            for batch in self._shown(batches):
                yield self._transfer(batch)

    def first(self) -> Any:
        """The first collated batch, not transferred: the same on every rank."""
        with _beside(self._loaders):
            torch.manual_seed(0)
            found = [next(iter(_share(loader, 0, 1)), None) for loader in self._loaders]
            if any(batch is None for batch in found):
                raise ValueError(f"{self._owner}(train_dataloaders): the training data must have at least one batch.")
            return found[0] if self._in_turn else tree_unflatten(found, self._structure)

    def _shown(self, batches: Iterable[Any]) -> Iterator[Any]:
        if not self._progress:
            yield from batches
            return
        started = time.monotonic()
        progress = Progress(transient=True)
        task = progress.add_task(f"{self._owner}: reading the training set", total=self._num_batches())
        try:
            for batch in batches:
                yield batch
                progress.advance(task)
                if not progress.live.is_started and time.monotonic() - started > _SILENT_SECONDS:
                    progress.start()
        finally:
            if progress.live.is_started:  # otherwise it would print an empty line where the output is a file
                progress.stop()

    def _num_batches(self) -> int | None:
        try:
            lengths = [-(-len(loader) // self._world_size) for loader in self._loaders]
        except TypeError:  # an iterable without a length
            return None
        return sum(lengths) if self._in_turn else max(lengths)


def _share(loader: Any, rank: int, world_size: int) -> Iterable[Any]:
    indices = _indices(loader)
    if indices is not None:
        return DataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            sampler=indices[rank::world_size],
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
        )
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return islice(loader, rank, None, world_size)
    return loader  # type: ignore[no-any-return]


def _indices(loader: Any) -> Sequence[int] | None:
    """The rows that a plain DataLoader reads in one epoch, without padding; None for any other loader."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return None
    if isinstance(loader.dataset, IterableDataset):
        return None
    # A custom batch sampler leaves the loader without a batch size and with an unused sampler.
    if loader.batch_sampler is not None and (type(loader.batch_sampler) is not BatchSampler or not loader.batch_size):
        return None
    sampler: Any = loader.sampler
    if type(sampler) is SubsetRandomSampler:
        return list(sampler.indices)
    whole = type(sampler) in (SequentialSampler, DistributedSampler) or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    )
    data = sampler.dataset if type(sampler) is DistributedSampler else getattr(sampler, "data_source", None)
    return range(len(cast(Sized, data))) if whole and data is loader.dataset else None


@contextmanager
def _beside(loaders: list[Any]) -> Iterator[None]:
    """Restores the global random states, and those of the loaders' and samplers' own generators."""
    owners = [(loader, getattr(loader, "sampler", None)) for loader in loaders]
    generators = {
        id(generator): generator
        for pair in owners
        for owner in pair
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator)
    }
    states = [(generator, generator.get_state()) for generator in generators.values()]
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)
        for generator, state in states:
            generator.set_state(state)
