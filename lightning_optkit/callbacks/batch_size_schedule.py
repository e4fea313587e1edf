# SPDX-License-Identifier: Apache-2.0
"""Grows (or shrinks) the batch size during the run, with an unchanged module and its own loader."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from torch.utils.data import DataLoader, DistributedSampler

from lightning_optkit._checks import check_bools, check_int, check_one_of, check_state
from lightning_optkit.callbacks.batch_regime import BatchRegime
from lightning_optkit.callbacks.scheduling.batch_size import (
    batches_in_epoch,
    check_clocks,
    check_epochs,
    check_resizable,
    set_batch_size,
)
from lightning_optkit.callbacks.scheduling.clock import over_all_ranks
from lightning_optkit.callbacks.scheduling.existing_schedulers import schedulers_of
from lightning_optkit.callbacks.scheduling.lr_scaling import forget_factor, multiply_bases
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_private import (
    BEFORE_EPOCH,
    SET_UP_DATA,
    DataFetcher,
    epoch_progress,
    iterator_of,
    limit_epoch,
    loaders_of,
    logs_now,
    restarted_mid_epoch,
    restarts,
    train_loaders,
    train_source,
)
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.schedules import Schedule
from lightning_optkit.schedules.schedule import check_schedule

__all__ = ["BatchSizeSchedule"]

_OWNER = "BatchSizeSchedule(...)"
_EXPONENTS = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}


class BatchSizeSchedule(FitCallback):
    """Changes the loader's batch size during the run, and optionally the learning rate with it.

    At a constant learning rate, a batch `n` times as large reduces the gradient noise like a learning rate `n` times as
    small, in fewer steps, so growing batches can replace a decaying learning rate.

    The size changes between epochs. A loader draws its order once per epoch, and its workers prefetch, so a change
    within an epoch would drop batches or repeat samples. With several processes it is the size per process.

    The base learning rate is that of the group (`initial_lr`, including groups added during the run), so that
    `LRSchedule` and torch's schedulers build on it. Count `LRSchedule` in samples or epochs, since there are fewer
    steps.

    Attributes:
        batch_size: Batch size of the current epoch, per process.
        samples_seen: Number of training samples so far, over all processes; saved in the checkpoint.

    Args:
        schedule: A factor of the loader's own batch size as a function of the epoch, rounded to the nearest integer,
            ties to even; or a mapping from epochs, from 0, to the batch size from then on, at least 1. Before the first
            of these epochs the loader keeps its own size.
        lr_scaling: The learning rate at size b, if it was tuned for the loader's own size B: "none" keeps it, "linear"
            multiplies it by b / B, "sqrt" by the square root of that.
        total: Length of the run in epochs, for a `Schedule`, at least 1. Default: `max_epochs`.
        log: Log `batch_size` and `samples_seen` if there is a logger.
        verbose: Print each change.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for an argument out of range; when the fit starts, if the loader's batch size cannot be changed, if
            an epoch would have no batch or no validation, with another callback that sets the size, or with a schedule
            whose count of steps would be wrong.

    Source: Smith et al., Don't Decay the Learning Rate, Increase the Batch Size, ICLR 2018 (arXiv:1711.00489); "linear"
    after Goyal et al. 2017 (arXiv:1706.02677), section 2.1; "sqrt" after Krizhevsky 2014 (arXiv:1404.5997).

    Example:
        >>> from lightning_optkit.schedules import piecewise_constant
        >>> grows = BatchSizeSchedule(piecewise_constant([30, 60], [1.0, 5.0, 25.0]))
        >>> same = BatchSizeSchedule({30: 640, 60: 3200})  # of a loader with batch_size=128
        >>> trainer = pl.Trainer(callbacks=[grows], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        schedule: Schedule | Mapping[int, int],
        lr_scaling: Literal["none", "linear", "sqrt"] = "none",
        *,
        total: int | None = None,
        log: bool = True,
        verbose: bool = True,
    ) -> None:
        if isinstance(schedule, Mapping):
            schedule = _checked(type(self).__name__, schedule)
        else:
            check_schedule(type(self).__name__, "schedule", schedule)
        check_bools(type(self).__name__, log=log, verbose=verbose)
        check_one_of(type(self).__name__, "lr_scaling", lr_scaling, _EXPONENTS)
        if total is not None:
            check_int(type(self).__name__, "total", total, minimum=1)
        self.schedule, self.lr_scaling = schedule, lr_scaling
        self.batch_size: int | None = None
        self.samples_seen = 0
        self._total, self._log, self._verbose = total, log, verbose
        self._base: int | None = None
        self._resumed_from: dict[str, Any] = {}
        self._fit_started = self._train_started = False
        self._loaders: list[DataLoader[Any]] = []  # the user's, and Lightning's copy of it
        self._old_iterator: object = None  # the iterator before the size changed

    def state_dict(self) -> dict[str, Any]:
        """The schedule's `repr`, the loader's own batch size, and the number of samples so far."""
        return {**self._described(), "samples_seen": self.samples_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the count. The size follows from the epoch; learning rates are in the optimizer's state."""
        kinds: dict[str, Any] = {"samples_seen": int, "schedule": str, "lr_scaling": str}
        state = check_state(type(self).__name__, state_dict, **kinds, **{"base batch size": (int, type(None))})
        self.samples_seen, self._resumed_from = state["samples_seen"], state

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        others = [*callbacks_of(trainer, BatchRegime), *callbacks_of(trainer, BatchSizeSchedule, but=self)]
        if others:
            raise ValueError(
                f"{type(self).__name__}(...) and {type(others[0]).__name__}(...): both set the batch size; give one."
            )
        self.batch_size = self._base = self._old_iterator = None
        self.samples_seen, self._resumed_from = 0, {}
        self._fit_started = self._train_started = False
        loop, source = trainer.fit_loop, train_source(trainer)
        self._at_end(partial(self._restore_rates, trainer))
        self._at_end(self._restore_sizes)
        # The first size is set before Lightning inserts its distributed sampler, counts the batches and starts to
        # prefetch; later ones before any hook of the epoch, since progress bars read the lengths.
        self._override(source, "dataloader", partial(self._first_size, trainer, source.dataloader))
        self._override(loop, SET_UP_DATA, partial(self._prepare_epoch, trainer, getattr(loop, SET_UP_DATA)))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fit_started = True
        # A sharded checkpoint restores only existing entries of groups.
        self._scale(trainer, 1.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, now in self._described().items():
            before = self._resumed_from.get(name, now)
            if before != now:
                rank_zero_warn(f"BatchSizeSchedule: resumed with {name} {now} in place of {before}.")
        self._train_started = True
        loop = trainer.fit_loop.epoch_loop
        self._override(loop, BEFORE_EPOCH, partial(self._begin_epoch, trainer, getattr(loop, BEFORE_EPOCH)))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._scale(trainer, self._factor)  # for groups added since
        if self._log and trainer.loggers and logs_now(trainer):
            now = {"batch_size": float(self.batch_size or 0), "samples_seen": float(self.samples_seen)}
            pl_module.log_dict(now, batch_size=1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        here = extract_batch_size(batch)
        alike = isinstance(getattr(trainer.train_dataloader, "sampler", None), DistributedSampler)
        self.samples_seen += here * Run(trainer).replicas if alike else over_all_ranks(trainer, here)

    # --- called before methods of Lightning's loops ---

    def _first_size(self, trainer: pl.Trainer, dataloader: Callable[[], Any]) -> Any:
        self._restore_sizes()  # a module may return the same loader again
        loader = dataloader()
        resizable = check_resizable(_OWNER, loader)
        self._base = resizable.batch_size
        self._resize(trainer, resizable, self._size_at(trainer, _epoch(trainer)))
        return loader

    def _prepare_epoch(self, trainer: pl.Trainer, setup_data: Callable[[], None]) -> None:
        before = train_loaders(trainer)
        setup_data()
        loaders = train_loaders(trainer)
        if loaders is None:
            return
        if before is None:
            self._check_run(trainer, loaders.flattened[0])
        # After resuming at an epoch's last batch, Lightning still compares its position with the length of that epoch;
        # ExactResume has reset the stage of the loop then, but not that it restarts.
        if not (restarted_mid_epoch(trainer) or (self._train_started and restarts(trainer))):
            self._change(trainer)

    def _begin_epoch(
        self, trainer: pl.Trainer, on_run_start: Callable[[DataFetcher], None], fetcher: DataFetcher
    ) -> None:
        self._change(trainer)
        on_run_start(fetcher)
        if self._old_iterator is not None and self._old_iterator is iterator_of(loaders_of(fetcher)):
            iter(fetcher)  # Lightning does not create a new one after resuming
        self._old_iterator = None

    # --- implementation ---

    def _size_at(self, trainer: pl.Trainer, epoch: int) -> int:
        assert self._base is not None
        if isinstance(self.schedule, dict):
            return next((size for start, size in reversed(self.schedule.items()) if start <= epoch), self._base)
        total = self._total or (trainer.max_epochs if trainer.max_epochs not in (None, -1) else None)
        try:
            size = round(self._base * self.schedule(epoch, total))
        except ValueError as error:
            if Run(trainer).is_trial:
                return self._base
            raise ValueError(
                f"{type(self).__name__}(schedule={self.schedule!r}): the run has {total or 'an unknown number of'} "
                f"epochs, and {error} Set Trainer(max_epochs=...) or BatchSizeSchedule(total=...)."
            ) from None
        if size < 1:
            raise ValueError(
                f"{type(self).__name__}(schedule={self.schedule!r}): the batch size would be {size} at epoch {epoch}; "
                "it must be at least 1."
            )
        return size

    @property
    def _factor(self) -> float:
        assert self.batch_size is not None and self._base is not None
        return float((self.batch_size / self._base) ** _EXPONENTS[self.lr_scaling])

    def _check_run(self, trainer: pl.Trainer, loader: DataLoader[Any]) -> None:
        if Run(trainer).is_trial:
            return
        epochs = max(1, trainer.max_epochs or 1)  # -1: the run has no end
        if isinstance(self.schedule, dict) and trainer.max_epochs != -1 and (last := max(self.schedule)) >= epochs:
            raise ValueError(
                f"{type(self).__name__}(schedule={self.schedule!r}): the run has {epochs} epochs, and never comes to "
                f"epoch {last}."
            )
        sizes = [self._size_at(trainer, epoch) for epoch in range(epochs)]
        batches = check_epochs(_OWNER, trainer, loader, sizes)
        dataset = sized_len(loader.sampler) or math.inf
        samples = [min(dataset, count * size) for count, size in zip(batches, sizes, strict=True)]
        check_clocks(_OWNER, trainer, samples)
        if not self._fit_started and len(set(batches)) > 1:
            window = trainer.accumulate_grad_batches
            steps = sum(math.ceil(count / window) for count in batches)
            rank_zero_warn(
                "BatchSizeSchedule: trainer.estimated_stepping_batches takes every epoch for as long as the first; "
                f"this run has {steps} steps. LRSchedule(interval='sample') knows."
            )

    def _resize(self, trainer: pl.Trainer, loader: DataLoader[Any], size: int) -> None:
        if not any(loader is known for known in self._loaders):
            self._loaders.append(loader)
        set_batch_size(loader, size)
        changes, self.batch_size = size != (self.batch_size or self._base), size
        if changes and self._verbose:
            rate = "" if self.lr_scaling == "none" else f", base learning rates times {self._factor:g}"
            rank_zero_info(f"BatchSizeSchedule: batch size {size} from epoch {_epoch(trainer)}{rate}")

    def _change(self, trainer: pl.Trainer) -> None:
        """Sets the loader's size for the epoch that starts, and updates Lightning's derived values."""
        combined = train_loaders(trainer)
        assert combined is not None
        (loader,) = combined.flattened
        size, old = self._size_at(trainer, _epoch(trainer)), loader.batch_size
        self._resize(trainer, loader, size)
        if size != old:
            batches = batches_in_epoch(_OWNER, trainer, loader)
            limit_epoch(trainer, combined, batches)
            if isinstance(trainer.val_check_interval, float) and trainer.val_check_batch and math.isfinite(batches):
                trainer.val_check_batch = max(1, int(batches * trainer.val_check_interval))
            self._old_iterator = iterator_of(combined)
        self._scale(trainer, self._factor)

    def _scale(self, trainer: pl.Trainer, factor: float) -> None:
        if self.lr_scaling == "none" and self._resumed_from.get("lr_scaling", "none") == "none":
            return
        multiply_bases(trainer.optimizers, [*schedulers_of(trainer)], factor)

    def _described(self) -> dict[str, Any]:
        return {"schedule": repr(self.schedule), "lr_scaling": self.lr_scaling, "base batch size": self._base}

    def _restore_rates(self, trainer: pl.Trainer) -> None:
        self._scale(trainer, 1.0)
        forget_factor(trainer.optimizers)

    def _forget(self) -> None:
        self._old_iterator, self._loaders = None, []

    def _restore_sizes(self) -> None:
        while self._loaders:
            assert self._base is not None
            set_batch_size(self._loaders.pop(), self._base)


def _epoch(trainer: pl.Trainer) -> int:
    """The current or starting epoch; `trainer.current_epoch` lags behind while a checkpoint is restored."""
    return int(epoch_progress(trainer).current.processed)


def _checked(owner: str, sizes: Mapping[int, int]) -> dict[int, int]:
    if not sizes:
        raise ValueError(f"{owner}(schedule={{}}): schedule must have at least one epoch.")
    for epoch, size in sizes.items():
        check_int(owner, "schedule", epoch, minimum=0)
        check_int(owner, f"schedule[{epoch}]", size, minimum=1)
    return dict(sorted(sizes.items()))
