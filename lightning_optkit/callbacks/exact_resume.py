# SPDX-License-Identifier: Apache-2.0
"""Makes a resumed run continue with the batches and random numbers of the uninterrupted run."""

import copy
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_optkit._torch_private import kept_iterator, num_yielded
from lightning_optkit.callbacks._data_order import data_order, differences, num_workers, what_workers_lose
from lightning_optkit.callbacks._open_window import gradients_of, set_gradients
from lightning_optkit.callbacks._own_buffers import buffers_of, set_buffers
from lightning_optkit.callbacks._rest_of_epoch import can_be_dealt_anew, deal_rest, dealing_of, dealt_anew, fill_in
from lightning_optkit.callbacks._states_of_ranks import states_of_ranks
from lightning_optkit.callbacks.safe_checkpoint_io import write_safely
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.deferred_signals import DeferredSignals
from lightning_optkit.callbacks.seams.double_precision import cast_before_loading
from lightning_optkit.callbacks.seams.failed_alone import failed_alike, wait_for_nobody
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.lightning_private import (
    BEFORE_EPOCH,
    BEFORE_FETCH,
    LOADER_IS_READY,
    RESET,
    VALIDATIONS,
    DataFetcher,
    HasState,
    Loop,
    accumulates,
    batch_progress,
    epoch_progress,
    fetcher_of,
    iterator_of,
    leave_finished_epoch,
    loaders_of,
    reopen_cut_epoch,
    restarts_epoch,
    resumes,
    set_fetched,
    set_sampler_epoch,
    train_loaders,
)
from lightning_optkit.callbacks.seams.parameter_numbers import number_by_module
from lightning_optkit.callbacks.seams.random_state import get_random_state, set_random_state

__all__ = ["ExactResume"]

SECONDS_BETWEEN_MESSAGES = 1.0


class ExactResume(FitCallback):
    """Makes `fit(ckpt_path=...)` bitwise equal to an uninterrupted run.

    Lightning saves no random state, and after a checkpoint within an epoch it restarts the loader, so that the first
    batches are seen twice and the last ones never. This callback saves the generators of Python, NumPy, torch and the
    loaders, per process; on resuming it draws the epoch's order again and skips the batches already seen.

    Exact for: checkpoints at any batch end, validation end or epoch end; any `num_workers`; shuffling; several loaders;
    iterable datasets that yield the same items when iterated again. Skipped batches are loaded, since only this
    restores the state of datasets and workers; a message says so if it takes long. Loaders with `state_dict`
    (torchdata's `StatefulDataLoader`) restore themselves, but not what their workers draw. Within an accumulation
    window the gradients so far are saved as well, those of every process. So are buffers in which the processes differ:
    BatchNorm's running statistics under FSDP2, or under DDP with `broadcast_buffers=False`.

    Checkpoints are written, and checked in every stage, by `SafeCheckpointIO`, unless another `CheckpointIO` is given.

    Validation uses a copy of the random state, so that training does not depend on whether it ran: Lightning skips it
    when resuming from a checkpoint written at the end of the batch before it.

    After a checkpoint written at the end of an epoch's last batch, Lightning does not call `on_train_epoch_end`, so
    random numbers drawn there are missed; without a known length it also counts one epoch too many. Use a checkpoint
    written in `on_train_epoch_end`.

    On an exception under DDP nothing waits for other processes, which may not have it: `OnExceptionCheckpoint` and
    `ModelCheckpoint(save_on_exception=True)` write their file at once, with the random states of the first process
    only, so the run resumed from it sees the same data, but is not exact. With weights sharded by FSDP2 they write a
    file if all processes fail at the same place; otherwise none, since each process has a part of the weights, and a
    warning names the newest checkpoint.

    On SIGTERM in any process all of them stop before their next batch, with a `SIGTERMException`, and the same
    callbacks write an exact checkpoint. SLURM's signal for requeueing, too, is acted on there. Both wait for a
    validation in progress.

    A checkpoint written after the fit (`trainer.save_checkpoint`) has the state of its end, from which a longer run
    continues: within the epoch, if the fit was stopped there (`max_steps`, `max_time`), which Lightning takes for its
    end.

    Not exact, with a warning: another number of processes or batch size. Within an epoch, the samples not yet seen are
    dealt out anew: each is seen once, except those that are repeated to give every process the same number; order of
    the batches and random numbers differ. A window of accumulation goes on with the mean of the gradients of the
    processes before, except those of sharded weights. This needs one loader of a map-style dataset whose sampler is a
    `DistributedSampler` (Lightning inserts it), or in one process a `RandomSampler` or `SequentialSampler`, without
    `limit_train_batches`.

    Not exact, with a warning, and as without this callback: other training data (number of samples or loaders, another
    type of sampler, generators of its own), or other processes or batch sizes with other loaders than those above.
    Random numbers that a dataset draws with another `num_workers` differ, and those drawn in `persistent_workers` after
    their first epoch, since the state of those processes cannot be read.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ExactResume()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._world_size = 1
        self._last: dict[str, Any] | None = None  # of this process, at the end of the last fit
        self._resume: dict[str, Any] | None = None
        self._epoch: dict[str, Any] = {}  # states before iter() and before the fetches that need one
        self._outer: dict[str, Any] | None = None  # random state of the training during a validation
        self._before_batch: dict[str, Any] | None = None
        self._recording = self._is_exact = False
        self._is_alone = False  # after an exception, which other processes may not have
        self._fetches = 0  # in the current epoch
        self._cycles: list[tuple[int, int]] = []  # per loader: its iterator and its position
        self._cycled: set[int] = set()  # the fetches in which a loader restarted
        self._dealt_anew: tuple[Any, Any] | None = None  # a batch sampler and its own order
        self._signals: DeferredSignals | None = None

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Random states and position in the epoch, of every process; after a fit those of its end."""
        state = self._state() if self._is_training else self._last
        if state is None:
            return self._resume or {}
        if self._world_size == 1 or not torch.distributed.is_initialized():
            return dict(state)
        return {**state, "ranks": states_of_ranks(state["ranks"][0], self._world_size, self._is_alone)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = state_dict

    def _state(self) -> dict[str, Any]:
        """The state of this process."""
        assert self._trainer is not None
        self._note_new_cycle()
        progress = batch_progress(self._trainer)
        unfinished_batch = progress.current.processed < progress.current.ready
        mine = {
            "now": self._before_batch if unfinished_batch else self._outer or self._random_state(),
            "epoch": {**self._epoch, "fetches": dict(self._epoch["fetches"])},
            "finished": progress.is_last_batch and not unfinished_batch,
        }
        is_in_window = bool(not unfinished_batch and progress.current.ready and accumulates(self._trainer))
        mine["gradients"] = gradients_of(self._trainer.lightning_module) if is_in_window else {}
        mine["buffers"] = buffers_of(self._trainer)
        return {
            "ranks": [mine],
            "loaders": data_order(self._trainer, self._loaders),
            "num_workers": num_workers(self._loaders),
            "dealing": self._dealing(),
        }

    def _dealing(self) -> dict[str, Any] | None:
        assert self._trainer is not None
        return dealing_of(self._loaders, self._world_size, self._trainer.num_training_batches)

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
        self._is_alone = False
        self._at_end(self._undeal)
        self._forget()
        self._trainer, self._world_size, self._last, self._resume = trainer, trainer.world_size, None, None
        self._signals = DeferredSignals(trainer, self._override)
        # Overrides methods of the loops, since there is no hook between iter() and the first batch.
        loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._stand_before(loop, LOADER_IS_READY, self._loader_is_ready)
        self._stand_before(epoch_loop, RESET, self._reset)
        self._stand_before(epoch_loop, BEFORE_EPOCH, self._epoch_begins)
        self._stand_before(epoch_loop, BEFORE_FETCH, self._before_fetch)
        for name in VALIDATIONS:
            self._stand_before(epoch_loop.val_loop, name, self._validate)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        is_ours = bool(checkpoint.get("callbacks", {}).get(self.state_key))
        changed = checkpoint if is_ours else {"loops": copy.deepcopy(checkpoint["loops"])}
        if self._trainer is not None and reopen_cut_epoch(changed) and not is_ours:
            rank_zero_warn(
                "ExactResume: the checkpoint was saved without it by a run that had stopped within an epoch; the run "
                "goes on with the next epoch, and is not exact."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._resume is None:
            return
        before = {"processes": len(self._resume["ranks"]), **self._resume.get("loaders", {})}
        here = {"processes": trainer.world_size, **data_order(trainer, self._loaders)}
        changed = differences(before, here)
        if changed:
            names = {name for name in here if name in before and before[name] != here[name]}
            dealing = self._dealing()
            if dealing is None or not can_be_dealt_anew(names, self._resume.get("dealing"), dealing):
                rank_zero_warn(f"ExactResume: the run was saved with {changed}; it is not exact.")
                self._resume = None
                return
            self._resume = dealt_anew(trainer, self._resume, dealing, self._random_state())
            once = "" if self._resume["ranks"][0]["finished"] else "each sample of the epoch is seen once, but "
            others = f"{once}batches and random numbers are others"
            rank_zero_warn(f"ExactResume: the run was saved with {changed}; {others}; it is not exact.")
        lost = what_workers_lose(trainer, self._loaders, self._resume)
        for each in lost:
            rank_zero_warn(f"ExactResume: {each}")
        ranks = self._resume["ranks"]
        self._is_exact = not (changed or lost or None in ranks)
        fill_in(ranks, trainer.global_rank, self._random_state())
        mine = ranks[trainer.global_rank]
        if mine["finished"]:
            leave_finished_epoch(trainer)
        self._set_random_state(mine["now"])
        set_gradients(pl_module, mine["gradients"])
        set_buffers(trainer, mine.get("buffers", {}))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = self._state()  # the loops release their loaders before `teardown`

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        several = trainer.world_size > 1 and torch.distributed.is_initialized()
        self._is_alone = several and not is_a(exception, SIGTERMException)  # which every process raises, see `_signals`
        if self._is_alone and is_a(trainer.strategy, ModelParallelStrategy):
            self._is_alone = not failed_alike(trainer, exception)
        super().on_exception(trainer, pl_module, exception)
        if self._is_alone:
            wait_for_nobody(trainer, self._override)

    def _forget(self) -> None:
        if self._is_training:  # after an exception; later callbacks may still write a checkpoint
            with suppress(RuntimeError):  # after a device failure nothing can be read
                self._last = self._state()
        self._trainer, self._epoch, self._outer, self._before_batch, self._recording = None, {}, None, None, False
        self._fetches, self._cycles, self._cycled, self._dealt_anew, self._signals = 0, [], set(), None, None

    # --- called before methods of Lightning's loops ---

    def _stand_before(self, loop: Loop, name: str, method: Callable[..., Any]) -> None:
        """`method` receives the original, then the loop's arguments."""
        self._override(loop, name, partial(method, getattr(loop, name)))

    def _loader_is_ready(self, load_states: Callable[[], None]) -> None:
        """Called right before iter(), after Lightning has created the loader."""
        load_states()
        self._note_beginning()

    def _reset(self, reset: Callable[[], None]) -> None:
        """Without Lightning's warning that the loader cannot go on within an epoch, where this callback makes it."""
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
            iterates = self._trainer.current_epoch > 0 and not resumes(self._trainer)
            if iterates and not restarts_epoch(self._trainer):
                self._note_beginning()
            on_run_start(fetcher)
        elif saved["finished"]:
            # Otherwise Lightning would start the next epoch with the iterator created before the states were set.
            self._note_beginning()
            on_run_start(fetcher)
            if batch_progress(self._trainer).current.ready == 0:
                self._set_random_state(self._epoch["iter"])
                iter(fetcher)
        else:
            on_run_start(fetcher)
            if not any(isinstance(loader, HasState) for loader in self._loaders):
                self._fast_forward(fetcher, saved["epoch"], batch_progress(self._trainer).current.ready)
            self._set_random_state(saved["now"])
        self._recording = True

    def _fast_forward(self, fetcher: DataFetcher, epoch: dict[str, Any], batches: int) -> None:
        """Starts the epoch like the original, and skips the batches already seen."""
        assert self._trainer is not None
        self._epoch, self._cycled = epoch, set(epoch["fetches"])
        if epoch["fresh"]:
            loaders_of(fetcher).reset()
        epoch_index = epoch_progress(self._trainer).current.processed
        for loader in self._loaders:
            set_sampler_epoch(loader, epoch_index)
        self._set_random_state(epoch["iter"])
        if rest := epoch.get("rest"):
            (loader,) = self._loaders
            self._dealt_anew = loader.batch_sampler, loader.batch_sampler.sampler
            deal_rest(loader, rest)
            batches -= rest["position"]
        iter(fetcher)
        if rest:
            set_fetched(fetcher, len(loader) - rest["left"])
        shown = time.monotonic()
        for index in range(batches):
            if index in epoch["fetches"]:
                self._set_random_state(epoch["fetches"][index])
            next(fetcher)
            if time.monotonic() - shown > SECONDS_BETWEEN_MESSAGES:
                shown = time.monotonic()
                rank_zero_info(f"ExactResume: skipped {index + 1} of {batches} batches already seen.")
        self._fetches = batches
        self._note_new_cycle()

    def _undeal(self) -> None:
        """Gives the loader its own order again."""
        if self._dealt_anew is not None:
            batch_sampler, sampler = self._dealt_anew
            batch_sampler.sampler, self._dealt_anew = sampler, None

    def _before_fetch(self, on_before_fetch: Callable[[], None]) -> None:
        if self._recording:
            assert self._signals is not None
            self._signals.act()
            self._note_new_cycle()
            self._before_batch = self._random_state()
            # The sampler draws its seed in the first fetch; the last two may contain a prefetched batch.
            states, index = self._epoch["fetches"], self._fetches
            if index - 2 not in self._cycled and index > 2:
                states.pop(index - 2, None)
            states[index] = self._before_batch
            self._fetches += 1
        on_before_fetch()

    def _validate(self, run: Callable[[], Any]) -> Any:
        assert self._trainer is not None
        if self._trainer.sanity_checking:
            return run()
        self._outer = self._random_state()
        result = run()
        self._set_random_state(self._outer)
        self._outer = None
        return result

    # --- records ---

    def _note_beginning(self) -> None:
        """The states before iter(). A loader's persistent workers draw a seed only when they are created."""
        fresh = all(kept_iterator(loader) is None for loader in self._loaders)
        self._epoch = {"iter": self._random_state(), "fresh": fresh, "fetches": {}}
        self._fetches, self._cycles, self._cycled = 0, [], set()

    def _note_new_cycle(self) -> None:
        """Notes a loader that ended before the longest one and restarted, in the previous fetch."""
        assert self._fetcher is not None
        iterators = getattr(iterator_of(loaders_of(self._fetcher)), "iterators", [])
        if len(iterators) < 2:
            return
        # Persistent workers keep their iterator and restart its count.
        now = [(id(iterator), num_yielded(iterator)) for iterator in iterators]
        begun = [new[0] != old[0] or new[1] < old[1] for old, new in zip(self._cycles, now, strict=False)]
        if any(begun):
            self._cycled.add(self._fetches - 1)
        self._cycles = now

    @property
    def _is_training(self) -> bool:
        """Between the loader's first iter() and the end of the loops."""
        return self._fetcher is not None and bool(self._epoch)

    @property
    def _fetcher(self) -> DataFetcher | None:
        return fetcher_of(self._trainer) if self._trainer else None

    @property
    def _loaders(self) -> list[Any]:
        assert self._trainer is not None
        combined = train_loaders(self._trainer)
        return combined.flattened if combined is not None else []

    def _random_state(self) -> dict[str, Any]:
        assert self._trainer is not None
        return get_random_state(self._loaders, self._trainer.strategy.root_device)

    def _set_random_state(self, state: dict[str, Any]) -> None:
        assert self._trainer is not None
        set_random_state(state, self._loaders, self._trainer.strategy.root_device)
