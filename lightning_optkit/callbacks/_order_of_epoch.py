# SPDX-License-Identifier: Apache-2.0
"""What the order of an epoch's batches is drawn from and each begins with, and the repetition of those already seen."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_optkit._torch_private import kept_iterator, num_yielded
from lightning_optkit.callbacks._cut_epoch import CutEpoch
from lightning_optkit.callbacks._open_window import OpenWindow
from lightning_optkit.callbacks._rest_of_epoch import deal_rest, dealing_of
from lightning_optkit.callbacks._same_state import is_same_state
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.deferred_signals import DeferredSignals
from lightning_optkit.callbacks.seams.fetches_in_step import fetches_in_step
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_private import (
    FETCHES,
    DataFetcher,
    batch_progress,
    epoch_progress,
    fetcher_of,
    iterator_of,
    loaders_of,
    set_fetched,
    set_sampler_epoch,
    train_loaders,
)
from lightning_optkit.callbacks.seams.own_generators import OwnGenerator, generators_of, set_state_of, state_of
from lightning_optkit.callbacks.seams.random_state import (
    get_random_state,
    own_generators,
    set_random_state,
    set_seed_of_process,
)

__all__ = ["OrderOfEpoch"]

SECONDS_BETWEEN_MESSAGES = 1.0


class OrderOfEpoch(FitCallback):
    """Notes the random states that an epoch's batches follow from, and fetches its first batches again."""

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._world_size = 1
        self._epoch: dict[str, Any] = {}  # states before iter() and before the fetches that need one
        self._fetches = 0  # in the current epoch
        self._cycles: list[tuple[int, int]] = []  # per loader: its iterator and its position
        self._cycled: set[int] = set()  # the fetches in which a loader restarted
        self._seed_before: tuple[str | None, ...] = ()  # of the process, which has that of the saved run until the end
        self._dealt_anew: tuple[Any, Any] | None = None  # a batch sampler and its own order
        self._own: dict[str, OwnGenerator] = {}  # those of data and module, by where they are
        self._recording = False
        self._signals: DeferredSignals | None = None
        self._before_batch: dict[str, Any] | None = None
        self._fetches_after = -1  # batches, in total, after which the last fetch began
        self._window = OpenWindow()
        self._cut: CutEpoch | None = None  # of the last fit, if it was stopped within an epoch

    def _forget(self) -> None:
        if self._seed_before:
            set_seed_of_process(*self._seed_before)
        self._seed_before = ()
        self._trainer, self._epoch = None, {}
        self._fetches, self._cycles, self._cycled, self._dealt_anew, self._own = 0, [], set(), None, {}

    def _dealing(self) -> dict[str, Any] | None:
        assert self._trainer is not None
        return dealing_of(self._loaders, self._world_size, self._trainer.num_training_batches)

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
        source, shown = getattr(fetcher, FETCHES, fetcher), time.monotonic()
        for index in range(batches):
            if index in epoch["fetches"]:
                self._set_random_state(epoch["fetches"][index])
            next(source)
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

    def _note_beginning(self) -> None:
        """The states before iter(). A loader's persistent workers draw a seed only when they are created."""
        self._find_own()
        fresh = all(kept_iterator(loader) is None for loader in self._loaders)
        self._epoch = {"iter": self._random_state(), "fresh": fresh, "fetches": {}}
        self._fetches, self._cycles, self._cycled = 0, [], set()

    def _before_fetch(self, on_before_fetch: Callable[[], None]) -> None:
        """Called before a method of Lightning's loop."""
        if self._recording:
            assert self._trainer is not None and self._signals is not None
            # A step that fetches has begun its batch, which is repeated from the state noted here.
            in_step = fetches_in_step(self._trainer)
            if not in_step:
                self._signals.act()
            self._note_new_cycle()
            self._batch_begins(self._trainer)
            self._note_fetch()
            if in_step:
                self._signals.act()
        on_before_fetch()

    def _batch_begins(self, trainer: pl.Trainer) -> None:
        """Notes what a run that repeats the batch begins with."""
        self._before_batch, self._cut = self._random_state(), None
        self._fetches_after = batch_progress(trainer).total.ready
        self._window.batch_begins(trainer)

    def _note_fetch(self) -> None:
        """The sampler draws its seed in the first fetch; the last two may contain a prefetched batch."""
        states, index = self._epoch["fetches"], self._fetches
        if index - 2 not in self._cycled and index > 2:
            states.pop(index - 2, None)
        states[index] = self._before_batch
        self._fetches += 1

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
    def _is_trial(self) -> bool:
        """Whether steps are tried within a fit, by another callback."""
        return self._trainer is not None and self not in callbacks_of(self._trainer, type(self))

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

    def _find_own(self) -> None:
        assert self._trainer is not None
        self._own = generators_of(self._loaders, self._trainer.lightning_module, [*own_generators(self._loaders)])

    def _random_state(self) -> dict[str, Any]:
        assert self._trainer is not None
        return {**get_random_state(self._loaders, self._trainer.strategy.root_device), "own": self._own_states()}

    def _state_now(self, before: dict[str, Any] | None, is_repeated: bool) -> dict[str, Any]:
        """The state that the training goes on from.

        Args:
            before: In a validation, the state before it, of which it uses a copy; but it draws from generators of data
                and module as from any.
            is_repeated: Whether a run that is resumed begins that validation anew.
        """
        if before is None:
            return self._random_state()
        return before if is_repeated else {**before, "own": self._own_states()}

    def _own_states(self) -> dict[str, Any]:
        return {path: state_of(generator) for path, generator in self._own.items()}

    def _set_random_state(self, state: dict[str, Any], but_own: bool = False, says: bool = False) -> None:
        assert self._trainer is not None
        set_random_state(state, self._loaders, self._trainer.strategy.root_device)
        if but_own:
            return
        saved = state.get("own", {})  # of older versions no checkpoint has it
        if not saved.keys() <= self._own.keys():  # one may be made for the first sample
            self._find_own()
        for path in saved.keys() & self._own.keys():
            with suppress(TypeError, ValueError, AttributeError):  # of another kind; `_warn_of_own` says so
                set_state_of(self._own[path], saved[path])
        if says:
            self._warn_of_own(saved)

    def _warn_of_own(self, saved: dict[str, Any]) -> None:
        """Says which of them do not go on from what was set."""
        now = self._own_states()
        if others := [path for path, state in saved.items() if not is_same_state(state, now.get(path))]:
            rank_zero_warn(
                f"ExactResume: the run that was saved had random generators of its own that are not here ({others[0]}"
                + f" and {len(others) - 1} more" * (len(others) > 1)
                + "); it is not exact."
            )
