# SPDX-License-Identifier: Apache-2.0
"""Trains for some steps from within a fit, and brings the run back to where it was.

Lightning's finders do the same by a checkpoint in the user's folder; here it stays in memory, and the random state,
which they leave changed, is restored as well.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit._torch_private import kept_iterator, set_kept_iterator
from lightning_optkit.callbacks.seams.lightning_private import (
    LOADER_IS_READY,
    forget_restart,
    nested_run,
    restore_whole_state,
    train_loaders,
    whole_state,
)
from lightning_optkit.callbacks.seams.module_state import Attributes
from lightning_optkit.callbacks.seams.overrides import override, restore
from lightning_optkit.callbacks.seams.own_generators import OwnGenerator, generators_of, set_state_of, state_of
from lightning_optkit.callbacks.seams.random_state import get_random_state, own_generators, set_random_state
from lightning_optkit.callbacks.seams.state_of_step import StateOfStep

__all__ = ["TrialFits"]

_CHANGED_BY_STEPS = {"state_dict", "optimizer_states", "lr_schedulers", "callbacks", "loops"}


class TrialFits:
    """Trains for some steps from within a fit, each time from the state that the run has now, and restores the run.

    Restored are weights, buffers, attributes and metrics of the module, optimizers, schedulers, loss scaler, callbacks'
    states, loops, random numbers, and the generators of loaders, of their data and of the module. Nothing is logged,
    validated or saved, and no scheduler is stepped. What other callbacks have changed so far (fused optimizers,
    clipping) stays in force.

    Args:
        trainer: The Trainer, in `on_fit_start`.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._callbacks: dict[str, Any] | None = None

    def __call__(self, watcher: pl.Callback, max_steps: int) -> bool:
        """Trains for up to `max_steps` optimizer steps with `watcher` as the only callback, then restores the run.

        It ends early if `watcher` sets `trainer.should_stop = True`, or if an epoch has no batch.

        Returns:
            False if it ended with an epoch without a step: data that can be read only once are used up.
        """
        trainer = self._trainer
        device = trainer.strategy.root_device
        random = get_random_state([], device)
        module = trainer.lightning_module
        kept, attributes = StateOfStep(trainer, module), Attributes(module)
        names, trained = set(module.state_dict()), {param: param.requires_grad for param in module.parameters()}
        state = {name: _copied(name, part) for name, part in whole_state(trainer).items()}
        # Those of the first time: a callback that has seen a trial's loaders may say more, as if a run were resumed.
        self._callbacks = state["callbacks"] if self._callbacks is None else self._callbacks
        state["callbacks"] = copy.deepcopy(self._callbacks)
        last = _StopAfterEmptyEpoch()
        with _loaders_rewound(trainer):
            try:
                with _only(trainer, watcher, last):
                    nested_run(trainer, max_steps)
            finally:
                # First, so that states fit: the module may have set other optimizers, or a buffer that was None.
                kept.restore()
                made = {name: value for name, value in module.state_dict().items() if name not in names}
                state["state_dict"].update(made)  # at the first forward
                restore_whole_state(trainer, state)
                forget_restart(trainer)
                set_random_state(random, [], device)
                kept.restore()  # torch has replaced the groups, and tensors in them, by copies
                attributes.restore()
                for param, requires_grad in trained.items():
                    param.requires_grad_(requires_grad)
        return not last.was_empty


def _copied(name: str, part: Any) -> Any:
    """A copy of a part of a checkpoint; what a user put there may be an object that has none, such as a lock."""
    try:
        return copy.deepcopy(part)
    except Exception:
        if name in _CHANGED_BY_STEPS:
            raise
        return part


@contextmanager
def _loaders_rewound(trainer: pl.Trainer) -> Iterator[None]:
    """Loaders are at the end as before the first batch: generators at or below them, and iterators that they keep."""
    generators: dict[int, tuple[OwnGenerator, Any]] = {}
    iterators: dict[int, tuple[object, object]] = {}

    def loader_is_ready() -> None:
        ready()
        loaders: Any = train_loaders(trainer)
        own = [*own_generators(loaders.flattened)]
        for generator in (*own, *generators_of(loaders.flattened, nn.Module(), but=own).values()):
            if id(generator) not in generators:
                generators[id(generator)] = generator, state_of(generator)
        for loader in loaders.flattened:
            if isinstance(loader, DataLoader) and loader.persistent_workers and id(loader) not in iterators:
                # The workers have copies of the data, which go on from one epoch to the next: those of a trial end.
                iterators[id(loader)] = loader, kept_iterator(loader)
                set_kept_iterator(loader, None)

    ready = getattr(trainer.fit_loop, LOADER_IS_READY)
    override(trainer.fit_loop, LOADER_IS_READY, loader_is_ready)
    try:
        yield
    finally:
        restore(trainer.fit_loop, LOADER_IS_READY, loader_is_ready)
        for loader, iterator in iterators.values():
            set_kept_iterator(loader, iterator)
        for generator, state in generators.values():
            set_state_of(generator, state)


@contextmanager
def _only(trainer: Any, *callbacks: pl.Callback) -> Iterator[None]:
    """These callbacks, and neither schedulers, loggers nor validation."""
    strategy = trainer.strategy
    names = ("callbacks", "loggers", "limit_val_batches", "should_stop")
    before = {name: getattr(trainer, name) for name in names}
    schedulers = strategy.lr_scheduler_configs
    bar = trainer.progress_bar_callback
    is_shown = bar is not None and getattr(bar, "is_enabled", True)  # by one process of several
    if is_shown:
        bar.disable()
    trainer.callbacks, trainer.limit_val_batches = [*callbacks], 0
    # The module may read them (`self.lr_schedulers()`), but none is due.
    strategy.lr_scheduler_configs = [replace(config, interval="never") for config in schedulers]
    trainer.loggers = [DummyLogger()] if before["loggers"] else []
    try:
        yield
    finally:
        strategy.lr_scheduler_configs = schedulers
        for name, value in before.items():
            setattr(trainer, name, value)
        if is_shown:
            bar.enable()


class _StopAfterEmptyEpoch(pl.Callback):
    """Or a trial over data that are used up would never end."""

    was_empty = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self._before:
            self.was_empty = trainer.should_stop = True
