# SPDX-License-Identifier: Apache-2.0
"""All that a `training_step` may change in module and Trainer, kept around passes that the run does not know of."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_optkit.callbacks.seams.copied_batch import copied_batch
from lightning_optkit.callbacks.seams.dry_run import without_trace
from lightning_optkit.callbacks.seams.kept_groups import KeptGroups
from lightning_optkit.callbacks.seams.kept_parameters import KeptParameters
from lightning_optkit.callbacks.seams.module_state import Buffers
from lightning_optkit.callbacks.seams.overrides import override, restore
from lightning_optkit.callbacks.seams.own_generators import generators_of, set_state_of, state_of
from lightning_optkit.callbacks.seams.second_pass import loss_of, restore_metrics, states_of_metrics

__all__ = ["StateOfStep", "without_effect"]


class StateOfStep:
    """What `restore` puts back, in place: all but attributes, logs, random numbers of the process and weights.

    That is buffers, metrics and generators of the module, the entries of the optimizers' groups, and whether the
    Trainer shall stop.

    Args:
        trainer: The Trainer, in a fit.
        pl_module: The module.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer, self._should_stop = trainer, trainer.should_stop
        self._buffers, self._metrics = Buffers(pl_module), states_of_metrics(pl_module)
        self._groups = KeptGroups(trainer)
        self._generators = [(each, state_of(each)) for each in generators_of([], pl_module, but=()).values()]

    def restore(self) -> None:
        """Puts all of it back."""
        self._trainer.should_stop = self._should_stop
        self._groups.restore()
        for generator, state in self._generators:
            set_state_of(generator, state)
        restore_metrics(self._metrics)
        self._buffers.restore()


@contextmanager
def without_effect(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Callable[..., Tensor | None]]:
    """Inside, what it yields may be called at will, and gradients be taken with `torch.autograd.grad`.

    On exit, all is as before that `training_step` may change in module and Trainer; nothing is logged, and no scheduler
    is stepped.

    Yields:
        Maps a `training_step`, a batch and its index to the loss for a copy of the batch, in the Trainer's precision;
        to None if it returns none.
    """
    state, params = StateOfStep(trainer, pl_module), KeptParameters(pl_module)

    def loss_for(step: Callable[..., Any], batch: Any, batch_idx: int) -> Tensor | None:
        index = (batch_idx,) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else ()
        with trainer.precision_plugin.train_step_context(), params.watched():
            return loss_of(step(copied_batch(batch), *index))

    with without_trace(pl_module), _unstepped(trainer), isolate_rng():
        try:
            yield loss_for
        finally:
            params.restore()
            state.restore()


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
