# SPDX-License-Identifier: Apache-2.0
"""Batch, stochastic or mini-batch gradient descent, with an unchanged module and its own loader."""

from functools import partial
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_optkit._checks import check_int, shown
from lightning_optkit.callbacks.exact_accumulation import ExactAccumulation
from lightning_optkit.callbacks.scheduling.batch_size import check_resizable, set_batch_size
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.lightning_private import train_source

__all__ = ["BatchRegime"]

WHOLE_EPOCH = 2**20  # batches; a power of two, so that multiplying and dividing by it is exact


class BatchRegime(ExactAccumulation):
    """Sets how many samples a step uses: all, one, or `regime`.

    "full" takes one step per epoch, with the gradient of the mean over all samples: the loader's batches only limit the
    memory, and a smaller last one is weighted correctly. "single" and a number change the loader's batch size during
    the fit; under DDP it is the size per process. Batches are weighted as in `ExactAccumulation`.

    Args:
        regime: "full" (batch gradient descent), "single" (stochastic gradient descent) or the batch size.

    Raises:
        ValueError: if it is another string or below 1; at the start of a fit, for "full" with
            `Trainer(accumulate_grad_batches)`, or if the loader's batch size cannot be changed.

    Source: Qiu, Neural Networks and Deep Learning, section 7.2.1.

    Example:
        >>> trainer = pl.Trainer(callbacks=[BatchRegime("full")], logger=False, enable_checkpointing=False)
    """

    def __init__(self, regime: Literal["full", "single"] | int) -> None:
        super().__init__()
        if isinstance(regime, str):
            if regime not in ("full", "single"):
                owner = type(self).__name__
                raise ValueError(
                    f'{owner}(regime={shown(regime)}): regime must be "full", "single" or an integer >= 1.'
                )
        else:
            check_int(type(self).__name__, "regime", regime, minimum=1)
        self.regime = regime

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.regime == "full" and trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f'BatchRegime("full") and Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}): '
                "both say when to step; give one."
            )
        if self.regime == "full" and callbacks_of(trainer, GradientAccumulationScheduler):
            raise ValueError('BatchRegime("full") and GradientAccumulationScheduler: both say when to step; give one.')
        super().setup(trainer, pl_module, stage)
        if self.regime == "full":
            self._at_end(partial(setattr, trainer, "accumulate_grad_batches", trainer.accumulate_grad_batches))
            trainer.accumulate_grad_batches = WHOLE_EPOCH
            return
        size = 1 if self.regime == "single" else int(self.regime)
        source = train_source(trainer)
        request = source.dataloader

        def dataloader() -> object:
            loader = request()
            self._resize(loader, size)
            return loader

        # Before Lightning inserts its distributed sampler, counts the batches and starts to prefetch.
        self._override(source, "dataloader", dataloader)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.regime == "full" and WHOLE_EPOCH < trainer.num_training_batches < float("inf"):
            raise ValueError(f'BatchRegime("full"): an epoch may have at most {WHOLE_EPOCH} batches.')

    def _resize(self, loader: object, size: int) -> None:
        resizable = check_resizable(f"{type(self).__name__}(regime={self.regime!r})", loader)
        assert resizable.batch_size is not None
        self._at_end(partial(set_batch_size, resizable, resizable.batch_size))
        set_batch_size(resizable, size)
