# SPDX-License-Identifier: Apache-2.0
"""Makes a resumed run continue with the batches and random numbers of the uninterrupted run."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_optkit.callbacks._beginning import is_of_beginning, state_to_begin_from
from lightning_optkit.callbacks._cut_epoch import CutEpoch
from lightning_optkit.callbacks._data_order import data_order, num_workers
from lightning_optkit.callbacks._open_validation import OpenValidation, begins_after_batch
from lightning_optkit.callbacks._open_window import OpenWindow, set_window
from lightning_optkit.callbacks._order_of_epoch import OrderOfEpoch
from lightning_optkit.callbacks._own_buffers import are_replaced
from lightning_optkit.callbacks._parts_of_process import give_back_parts, parts_of_process
from lightning_optkit.callbacks._reloads import Reloads, reload_epochs
from lightning_optkit.callbacks._rest_of_epoch import fill_in
from lightning_optkit.callbacks._saved_data import state_for_these_data, still_to_resume
from lightning_optkit.callbacks._states_of_ranks import states_of_ranks
from lightning_optkit.callbacks._switches import Switches
from lightning_optkit.callbacks.safe_checkpoint_io import write_safely
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.deferred_signals import DeferredSignals
from lightning_optkit.callbacks.seams.double_precision import cast_before_loading
from lightning_optkit.callbacks.seams.failed_alone import failed_alike, wait_for_nobody
from lightning_optkit.callbacks.seams.fetches_in_step import fetches_in_step, has_no_batch_left
from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.lightning_private import (
    AFTER_BATCH,
    AFTER_EPOCH,
    BEFORE_EPOCH,
    BEFORE_FETCH,
    LOADER_IS_READY,
    RESET,
    VALIDATIONS,
    DataFetcher,
    HasState,
    batch_progress,
    can_stop,
    end_restart,
    end_restart_of_epoch,
    has_all_but_no_validation,
    is_cut,
    leave_finished_epoch,
    restarted_mid_epoch,
    restarts_epoch,
    resumes,
    stops_now,
)
from lightning_optkit.callbacks.seams.parameter_numbers import number_by_module
from lightning_optkit.callbacks.seams.random_state import seed_of_process
from lightning_optkit.callbacks.seams.remembered_saves import places_of_saves, put_places_into, remember_saves
from lightning_optkit.callbacks.seams.saved_position import end_epoch_without_batch, reopen_cut_epoch
from lightning_optkit.callbacks.seams.saves_behind_module import save_behind_module

__all__ = ["ExactResume"]


class ExactResume(OrderOfEpoch):
    """Makes `fit(ckpt_path=...)` bitwise equal to an uninterrupted run.

    Lightning saves no random state, and after a checkpoint within an epoch it restarts the loader, so that the first
    batches are seen twice and the last ones never. This callback saves the generators of Python, NumPy, torch,
    loaders, data and module, per process; on resuming it draws the epoch's order again and skips the batches seen.
    A validation leaves the random state of the training as it was, where Lightning's moves it: a seeded run sees its
    samples in another order than without this callback, from the first validation on.

    - Exact: from a checkpoint at the end of a batch, a validation or an epoch, or after the fit; with any
      `num_workers`, shuffling, several loaders, and iterable datasets that yield the same items again. Skipped batches
      are loaded, since only this restores the state of datasets and workers; a message says so if it takes long.
    - Saved besides: the gradients of an open accumulation window, and buffers in which the processes differ, such as
      BatchNorm's running statistics under FSDP2.
    - Done when a run is resumed: what Lightning leaves out, such as the validation that was due, the hooks of an
      epoch's end, and steps of torch's `ReduceLROnPlateau`. A validation that was not finished begins anew.
    - On SIGTERM in any process, and on SLURM's signal, all of them stop before their next batch; then
      `OnExceptionCheckpoint` and `ModelCheckpoint(save_on_exception=True)` write an exact checkpoint.
    - On an exception no process waits for another that may not have it: under DDP those two write the random states and
      gradients of the first process only, with weights sharded by FSDP2 no file unless all fail at the same place. A
      warning says so.
    - Another number of processes or batch size: the samples of the epoch that were not seen are dealt out anew, each
      once, in another order. This needs one loader of a map-style dataset whose sampler is a `DistributedSampler`
      (Lightning inserts it), or in one process a `RandomSampler` or `SequentialSampler`, without `limit_train_batches`.
    - Not exact, with a warning, and as without this callback: other training data, samplers or loaders. Random numbers
      that a dataset draws with another `num_workers` differ, and those drawn in `persistent_workers` after their first
      epoch, since the state of those processes cannot be read.

    Files are written, and checked in every stage, by `SafeCheckpointIO`, unless another `CheckpointIO` is given.
    docs/distributed.md has each case beside what Lightning does.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ExactResume()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, Any] | None = None  # of this process, at the end of the last fit
        self._resume: dict[str, Any] | None = None
        self._outer: dict[str, Any] | None = None  # random state of the training during a validation
        self._validation: OpenValidation | None = None
        self._reloads: Reloads | None = None
        self._before_check: dict[str, Any] | None = None  # and before the sanity check
        self._is_alone = False  # after an exception, which other processes may not have
        self._begins = False  # the checkpoint was saved before the first batch
        self._ends_batch = False  # what follows the last batch of the checkpoint is still to be done
        self._followed = -1  # batches in total after the last one with all that follows it done
        self._is_exact = self._failed_to_fetch = False
        self._switches: Switches | None = None
        self._sums: dict[str, Any] = {}  # of metrics in the epoch that is resumed, until a batch is added
        self._places: dict[str, dict[str, Any]] = {}  # at which ModelCheckpoints saved before the fit ended

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Random states and position in the epoch, of every process; after a fit those of its end."""
        state = self._state() if self._is_training and self._resume is None else self._last
        if state is None and self._trainer is not None and not self._resume:
            state = self._state_before()
        if state is None:
            return still_to_resume(self._resume or {}, self._ends_batch)
        if self._world_size == 1 or not torch.distributed.is_initialized():
            return dict(state)
        return {**state, "ranks": states_of_ranks(state["ranks"][0], self._world_size, self._is_alone)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = state_dict

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        put_places_into(checkpoint, self._places)
        if self._cut is not None:
            self._cut.put_into(checkpoint, trainer)

    def _state(self) -> dict[str, Any]:
        """The state of this process."""
        assert self._trainer is not None
        self._note_new_cycle()
        progress = batch_progress(self._trainer)
        has_ended = has_no_batch_left(self._trainer)
        unfinished_batch = progress.current.processed < progress.current.ready and not has_ended
        if unfinished_batch and fetches_in_step(self._trainer) and self._fetches_after != progress.total.ready:
            self._batch_begins(self._trainer)  # its step has not fetched it yet
        repeats_batch, validation = unfinished_batch or self._failed_to_fetch, self._validation
        counts = validation.counts_before if validation else None
        mine = {
            "now": self._before_batch if repeats_batch else self._state_now(self._outer, is_repeated=bool(counts)),
            "epoch": {**self._epoch, "fetches": dict(self._epoch["fetches"])},
            "finished": (progress.is_last_batch or has_ended) and not unfinished_batch,
            "followed": progress.total.ready == self._followed,
            "stops": self._cut is not None and self._cut.validates,
            "validation": counts,
            "replaced": validation.replaced_before if validation and counts else are_replaced(self._trainer),
            "made": self._reloads.made if self._reloads else None,
            **parts_of_process(
                self._trainer, self._window, self._cut, self._switches, unfinished_batch, computes=not self._is_alone
            ),
        }
        return {
            "ranks": [mine],
            "loaders": data_order(self._trainer, self._loaders),
            "num_workers": num_workers(self._loaders),
            "dealing": self._dealing(),
            "reloaded": reload_epochs(self._trainer),
            "waits_to_stop": self._trainer.should_stop and not can_stop(self._trainer),  # for min_epochs, min_steps
        }

    def _state_before(self) -> dict[str, Any]:
        """The state of this process before the first batch, from which the whole run follows."""
        assert self._trainer is not None
        outside = self._before_check if self._trainer.sanity_checking else None  # Lightning goes back to it
        return {"ranks": [{"begin": self._epoch.get("iter") or outside or self._random_state(), "buffers": {}}]}

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        number_by_module(trainer)
        write_safely(trainer)
        cast_before_loading(trainer.strategy)
        if stage != "fit":
            return
        if callbacks_of(trainer, ExactResume, but=self):
            raise ValueError("ExactResume(): given twice; once is enough.")
        self._undo()  # what the exception of an earlier fit left
        self._at_end(self._undeal)
        self._forget()
        self._trainer, self._world_size, self._is_alone = trainer, trainer.world_size, False
        self._last = self._resume = self._cut = None
        self._places = {}
        self._seed_before = (seed_of_process(),)
        self._signals = DeferredSignals(trainer, self._override)
        save_behind_module(trainer, pl_module, self._override)
        remember_saves(trainer, self._override)
        # Overrides methods of the loops, since there is no hook between iter() and the first batch.
        loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._stand_before(loop, LOADER_IS_READY, self._loader_is_ready)
        self._stand_before(epoch_loop, RESET, self._reset)
        self._stand_before(epoch_loop, BEFORE_EPOCH, self._epoch_begins)
        self._stand_before(epoch_loop, BEFORE_FETCH, self._before_fetch)
        self._stand_before(epoch_loop, AFTER_BATCH, self._batch_ends)
        self._stand_before(loop, AFTER_EPOCH, self._epoch_ends)
        for name in VALIDATIONS:
            self._stand_before(epoch_loop.val_loop, name, self._validate)
        self._validation = OpenValidation(trainer, self._stand_before)
        self._reloads = Reloads(trainer, self._stand_before)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state:
            end_epoch_without_batch(checkpoint, state["ranks"])
        if self._trainer is not None:
            reopen_cut_epoch(checkpoint, is_exact=bool(state))
        if self._reloads is not None and state:
            self._reloads.go_on_from(state)
            self._ends_batch = begins_after_batch(checkpoint, state["ranks"])

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before_check = self._random_state()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._switches = Switches(pl_module)
        if is_of_beginning(self._resume):
            self._begin_as_saved()
        if self._resume is not None:
            self._resume, self._is_exact = state_for_these_data(
                trainer, self._loaders, self._resume, self._dealing, self._random_state
            )
        # Saved in the first hook of an epoch, Lightning leaves it out, whatever the data.
        if self._begins or (self._resume is None and trainer.fit_loop.restarted_on_epoch_start):
            leave_finished_epoch(trainer)
        if self._resume is None:
            return
        ranks = self._resume["ranks"]
        gradients = [each and each["gradients"] for each in ranks]
        fill_in(ranks, trainer.global_rank, self._random_state())
        mine = ranks[trainer.global_rank]
        if mine["finished"]:
            leave_finished_epoch(trainer)
        trainer.should_stop |= bool(self._resume.get("waits_to_stop")) and not can_stop(trainer)
        self._set_random_state(mine["now"], says=mine["finished"])
        self._sums = give_back_parts(trainer, self._switches, mine, gradients, self._override)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self._window.backward_begins()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._window.steps(optimizer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = None if self._resume else self._state()  # the loops release their loaders before `teardown`

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        several = trainer.world_size > 1 and torch.distributed.is_initialized()
        self._is_alone = several and not is_a(exception, SIGTERMException)  # which every process raises, see `_signals`
        if self._is_alone and is_a(trainer.strategy, ModelParallelStrategy):
            self._is_alone = not failed_alike(trainer, exception)
        is_before_batch = batch_progress(trainer).total.ready == self._fetches_after
        self._failed_to_fetch = is_before_batch and not fetches_in_step(trainer)
        super().on_exception(trainer, pl_module, exception)
        if self._is_alone:
            wait_for_nobody(trainer, self._override)

    def _forget(self) -> None:
        if self._resume:  # nothing was trained
            self._resume = still_to_resume(self._resume, self._ends_batch)
        elif self._is_training:  # after an exception; later callbacks may still write a checkpoint
            with suppress(RuntimeError):  # after a device failure nothing can be read
                self._last = self._state()
        elif self._trainer is not None and self._last is None:
            with suppress(RuntimeError):
                self._last = self._state_before()
        self._places = places_of_saves(self._trainer) if self._trainer is not None else self._places
        super()._forget()
        self._outer = self._before_batch = self._before_check = None
        self._signals = self._validation = self._switches = self._reloads = None
        self._recording = self._begins = self._ends_batch = self._failed_to_fetch = False
        self._sums, self._window, self._followed, self._fetches_after = {}, OpenWindow(), -1, -1

    # --- called before methods of Lightning's loops ---

    def _loader_is_ready(self, load_states: Callable[[], None]) -> None:
        """Called right before iter(), after Lightning has created the loader."""
        load_states()
        if is_of_beginning(self._resume):
            self._begin_as_saved()
        self._note_beginning()

    def _begin_as_saved(self) -> None:
        """Begins the whole run from a checkpoint that was saved before its first batch."""
        assert self._trainer is not None and self._resume is not None
        ranks, self._resume, self._begins = self._resume["ranks"], None, True
        begin = state_to_begin_from(ranks, self._trainer.global_rank, self._world_size, self._random_state())
        self._set_random_state(begin)

    def _reset(self, reset: Callable[[], None]) -> None:
        """Without Lightning's warning that the loader cannot go on within an epoch, where this callback makes it."""
        assert self._trainer is not None
        if restarted_mid_epoch(self._trainer):
            set_window(self._trainer)
        with warnings.catch_warnings():
            if self._resume is not None and self._is_exact:
                warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            reset()

    def _epoch_begins(self, on_run_start: Callable[[DataFetcher], None], fetcher: DataFetcher) -> None:
        assert self._trainer is not None
        self._recording = False
        self._undeal()
        saved = self._resume["ranks"][self._trainer.global_rank] if self._resume else None
        self._resume = None
        if saved is None:
            if self._trainer.current_epoch > 0 and not (resumes(self._trainer) or restarts_epoch(self._trainer)):
                self._note_beginning()
            on_run_start(fetcher)
        elif saved["finished"]:
            # Otherwise Lightning would start the next epoch with the iterator created before the states were set.
            self._note_beginning()
            on_run_start(fetcher)
            if batch_progress(self._trainer).current.ready == 0:
                self._set_random_state(self._epoch["iter"])
                iter(fetcher)
            elif has_all_but_no_validation(self._trainer, fetcher):
                end_restart_of_epoch(self._trainer)
        else:
            on_run_start(fetcher)
            if not any(isinstance(loader, HasState) for loader in self._loaders):
                self._fast_forward(fetcher, saved["epoch"], batch_progress(self._trainer).current.ready)
            self._set_random_state(saved["now"], says=True)
        self._recording, self._followed = True, -1
        if self._ends_batch or (saved and not saved["finished"] and saved.get("followed")):
            end_restart_of_epoch(self._trainer)
            self._followed = batch_progress(self._trainer).total.ready
        if self._ends_batch:
            self._ends_batch = False
            getattr(self._trainer.fit_loop.epoch_loop, AFTER_BATCH)(fetcher)

    def _batch_ends(self, on_advance_end: Callable[[DataFetcher], None], fetcher: DataFetcher) -> None:
        assert self._trainer is not None
        if not self._is_trial and stops_now(self._trainer, fetcher):
            self._cut = CutEpoch(self._trainer, self._window, validates=True)
        try:
            on_advance_end(fetcher)
        except SIGTERMException:  # within a validation, or after all that follows the batch
            if self._validation and self._validation.counts_before is None:
                self._followed = batch_progress(self._trainer).total.ready
            raise
        self._followed = batch_progress(self._trainer).total.ready
        if self._cut is not None:
            self._cut.batch_has_ended(self._trainer)

    def _epoch_ends(self, on_advance_end: Callable[[], None]) -> None:
        assert self._trainer is not None
        end_restart(self._trainer)
        is_whole = has_no_batch_left(self._trainer) or not is_cut(self._trainer)
        if self._cut is None and not self._is_trial and not is_whole:
            self._cut = CutEpoch(self._trainer, self._window)
        on_advance_end()
        self._sums.clear()
        if self._cut is not None:
            self._cut.has_ended(self._trainer)

    def _validate(self, run: Callable[[], Any]) -> Any:
        assert self._trainer is not None
        if self._trainer.sanity_checking or self._switches is None:
            return run()
        self._outer = self._random_state()
        result = self._switches.validate(run)
        self._set_random_state(self._outer, but_own=True)
        self._outer = None
        if self._cut is not None:
            self._cut.has_validated(self._trainer)
        return result
