# SPDX-License-Identifier: Apache-2.0
"""Runs `training_step` once more on a batch without a trace: for measurements only."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_optkit.callbacks.seams.copied_batch import copied_batch
from lightning_optkit.callbacks.seams.dry_run import without_trace
from lightning_optkit.callbacks.seams.module_state import Buffers
from lightning_optkit.callbacks.seams.overrides import override, restore
from lightning_optkit.callbacks.seams.own_generators import generators_of, set_state_of, state_of
from lightning_optkit.callbacks.seams.second_pass import loss_of, restore_metrics, states_of_metrics

__all__ = ["replayed_loss"]


def replayed_loss(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor | None:
    """The loss of the class's own `training_step`, without gradients and without what callbacks add to it.

    Buffers, metrics, attributes, logs, schedulers and random numbers, also of the module's own generators, are then as
    before. None if it returns none, or fails: it may need what only a Trainer's own call gives it.
    """
    step: Any = type(pl_module).training_step  # not that of the instance, which SAM and others override
    has_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    with _kept(pl_module), without_trace(pl_module), _unstepped(trainer), isolate_rng(), torch.no_grad():
        try:
            with trainer.precision_plugin.train_step_context():
                own = copied_batch(batch)
                return loss_of(step(pl_module, own, batch_idx) if has_index else step(pl_module, own))
        except Exception:
            return None


@contextmanager
def _unstepped(trainer: pl.Trainer) -> Iterator[None]:
    """Schedulers that `training_step` steps itself stay where they are."""
    held = [(config.scheduler, partial(_step_nothing)) for config in trainer.lr_scheduler_configs]
    for scheduler, function in held:
        override(scheduler, "step", function)
    try:
        yield
    finally:
        for scheduler, function in held:
            restore(scheduler, "step", function)


def _step_nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def _kept(pl_module: pl.LightningModule) -> Iterator[None]:
    buffers, metrics = Buffers(pl_module), states_of_metrics(pl_module)
    generators = [(each, state_of(each)) for each in generators_of([], pl_module, but=()).values()]
    try:
        yield
    finally:
        for generator, state in generators:
            set_state_of(generator, state)
        restore_metrics(metrics)
        buffers.restore()
