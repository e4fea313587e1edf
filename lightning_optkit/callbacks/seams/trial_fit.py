# SPDX-License-Identifier: Apache-2.0
"""Trains for some steps from within a fit, and brings the run back to where it was.

Lightning's finders do the same by a checkpoint in the user's folder; here it stays in memory, and the random state,
which they leave changed, is restored as well.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit.callbacks.seams.lightning_private import (
    LOADER_IS_READY,
    forget_restart,
    nested_run,
    restore_whole_state,
    train_loaders,
    whole_state,
)
from lightning_optkit.callbacks.seams.overrides import override, restore
from lightning_optkit.callbacks.seams.random_state import get_random_state, own_generators, set_random_state

__all__ = ["trial_fit"]


def trial_fit(trainer: pl.Trainer, watcher: pl.Callback, max_steps: int) -> None:
    """Trains for up to `max_steps` optimizer steps with `watcher` as the only callback, then restores the run.

    Restored are weights, optimizers, schedulers, loss scaler, callbacks' states, loops, random numbers and the
    generators of loaders. Nothing is logged, validated or saved. What other callbacks have changed so far (fused
    optimizers, clipping) stays in force. `watcher` may end it early by `trainer.should_stop = True`.

    Args:
        trainer: The Trainer, in `on_fit_start`.
        watcher: Callback of the trial.
        max_steps: Optimizer steps, at least 1.
    """
    device = trainer.strategy.root_device
    random, in_tensors = get_random_state([], device), _entries_in_tensors(trainer)
    state = copy.deepcopy(whole_state(trainer))
    with _generators_rewound(trainer):
        try:
            with _only(trainer, watcher):
                nested_run(trainer, max_steps)
        finally:
            restore_whole_state(trainer, state)
            forget_restart(trainer)
            set_random_state(random, [], device)
            for optimizer, place, name, tensor in in_tensors:  # torch has replaced the groups
                tensor.copy_(optimizer.param_groups[place][name])
                optimizer.param_groups[place][name] = tensor


def _entries_in_tensors(trainer: pl.Trainer) -> list[tuple[Optimizer, int, str, Tensor]]:
    """Learning rates and the like that are the user's own tensors, which a checkpoint would replace by copies."""
    return [
        (optimizer, place, name, value)
        for optimizer in trainer.optimizers
        for place, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if isinstance(value, Tensor)
    ]


@contextmanager
def _generators_rewound(trainer: pl.Trainer) -> Iterator[None]:
    """Generators that belong to the user's loaders are at the end where they were before the first batch."""
    undo: list[Callable[[], object]] = []

    def loader_is_ready() -> None:
        ready()
        loaders: Any = train_loaders(trainer)
        for generator in [] if undo else own_generators(loaders.flattened):
            undo.append(partial(generator.set_state, generator.get_state()))

    ready = getattr(trainer.fit_loop, LOADER_IS_READY)
    override(trainer.fit_loop, LOADER_IS_READY, loader_is_ready)
    try:
        yield
    finally:
        restore(trainer.fit_loop, LOADER_IS_READY, loader_is_ready)
        for rewind in undo:
            rewind()


@contextmanager
def _only(trainer: Any, watcher: pl.Callback) -> Iterator[None]:
    """This callback, and neither schedulers, loggers nor validation."""
    strategy = trainer.strategy
    names = ("callbacks", "loggers", "limit_val_batches", "should_stop")
    before = {name: getattr(trainer, name) for name in names}
    schedulers = strategy.lr_scheduler_configs
    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.disable()
    trainer.callbacks, trainer.limit_val_batches, strategy.lr_scheduler_configs = [watcher], 0, []
    trainer.loggers = [DummyLogger()] if before["loggers"] else []
    try:
        yield
    finally:
        strategy.lr_scheduler_configs = schedulers
        for name, value in before.items():
            setattr(trainer, name, value)
        if bar is not None:
            bar.enable()
