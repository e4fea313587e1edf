# SPDX-License-Identifier: Apache-2.0
"""Runs whose `training_step` takes a `dataloader_iter`, and fetches its batch itself: after the batch has begun."""

import lightning.pytorch as pl

from lightning_optkit.callbacks.seams.lightning_private import FETCHES, fetcher_of

__all__ = ["fetches_in_step", "has_no_batch_left"]


def fetches_in_step(trainer: pl.Trainer) -> bool:
    """Whether the run is one of these."""
    return hasattr(fetcher_of(trainer), FETCHES)


def has_no_batch_left(trainer: pl.Trainer) -> bool:
    """Whether such a step has found the end of a loader without a length, which counts as a batch that has begun."""
    fetcher = fetcher_of(trainer)
    return fetches_in_step(trainer) and fetcher is not None and fetcher.length is None and fetcher.done
