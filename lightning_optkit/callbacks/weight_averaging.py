# SPDX-License-Identifier: Apache-2.0
"""Averages the weights, and uses the average in validation, test, prediction and checkpoints."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_optkit._checks import check_bools, check_instance
from lightning_optkit.averaging import EMA, LAWA, SWA, PowerEMA
from lightning_optkit.callbacks.seams.average_of_run import average_of_run, warn_if_too_long
from lightning_optkit.callbacks.seams.batch_norm import batch_norms, check_batch, check_forward, recompute_batch_norm_
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.checkpointed_weights import (
    as_saved,
    copy_weights,
    holds_trained,
    load_trained,
    save_trained,
)
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.kept_average import KeptAverage, names_of
from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.lightning_private import key_of_state
from lightning_optkit.callbacks.seams.refusals import refuse_listed_twice
from lightning_optkit.callbacks.seams.resumed_averages import match_averages, name_as_saved
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.skipped_training import when_training_is_skipped
from lightning_optkit.step.numbers import starts_at_a_step
from lightning_optkit.step.shards import reshard

__all__ = ["WeightAveraging"]

_LIGHTNINGS = (
    StochasticWeightAveraging,
    getattr(lightnings, "WeightAveraging", StochasticWeightAveraging),
)  # since 2.6


class WeightAveraging(FitCallback):
    """Averages the weights over training: part of a one-pass step, or in a separate pass after any other step.

    The average is stored in the optimizer's state: sharded like the parameters (`ModelParallelStrategy`), and in every
    full checkpoint. From its first update on, validation uses it, the `state_dict` of every checkpoint contains it
    (with the trained weights, for resuming, under `current_model_state`), and the module has it when `fit` returns. A
    checkpoint of `save_weights_only=True` contains only the average; for the trained weights save a full one and read
    its `current_model_state`. If the average never starts, all of them contain the trained weights, and a warning says
    so.

    There may be several with different averages; one of them is evaluated. The first one (except `LAWA`) is part of the
    step, the others take a separate pass: see `explain`. When a checkpoint is resumed, each goes on from its own, in
    any order, and the one that was part of the step stays so; one with other settings goes on with those, and one of
    another kind begins anew, each with a warning.

    Integer buffers are the model's own. So are floating-point buffers, unless one of the two options below is set.

    Args:
        average: The average: `EMA(0.999)`, `PowerEMA(0.1)`, `SWA(0.75)` or `LAWA(6, every=100)`. One that starts at an
            epoch starts at its first step, if all epochs are as long as that in which the training starts.
        evaluate: Whether validation and checkpoints use this average, and the module has it at the end.
        average_buffers: Also average the floating-point buffers.
        update_bn: Recompute BatchNorm's running statistics for the average before it is evaluated, saved, or left in
            the module: one pass over the training data by `forward` on the first item of each batch, once for each
            average, merged over the processes. The statistics of the training itself are not changed.

    Raises:
        ValueError: when the fit starts, for two evaluated averages, or one together with Lightning's own, for an
            optimizer with another average, or for a strategy without access to the parameters.

    Example:
        >>> from lightning_optkit.averaging import EMA
        >>> trainer = pl.Trainer(callbacks=[WeightAveraging(EMA(0.99))], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        average: EMA | PowerEMA | SWA | LAWA,
        evaluate: bool = True,
        average_buffers: bool = False,
        update_bn: bool = False,
    ) -> None:
        check_instance(type(self).__name__, "average", average, (EMA, PowerEMA, SWA, LAWA), "one such as EMA(0.999)")
        check_bools(type(self).__name__, evaluate=evaluate, average_buffers=average_buffers, update_bn=update_bn)
        if update_bn and not evaluate:
            raise ValueError(
                f"{type(self).__name__}(update_bn=True): evaluate must be True; nothing else uses the statistics."
            )
        self.average, self.evaluate = average, evaluate
        self.average_buffers, self.update_bn = average_buffers, update_bn
        self._kept = KeptAverage(average)
        self._key = key_of_state(self, average=repr(average))  # Lightning asks for it before each hook
        self._is_training = False
        self._knows_batch = not update_bn  # whether the first batch was checked
        self._trained: dict[Tensor, Tensor] = {}  # while the module holds the average: the trained values
        self._batch_norm: tuple[int, dict[str, Tensor]] | None = None  # statistics, and the step they belong to

    @property
    def state_key(self) -> str:
        """Separate states for several averages in one run."""
        return self._key

    def state_dict(self) -> dict[str, Any]:
        """Optimizer steps so far, for averages that are not updated by every one; its name; averages of buffers."""
        return self._kept.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state.

        Raises:
            ValueError: if the checkpoint has this average under another name.
        """
        self._kept.load_state_dict(state_dict)

    def explain(self) -> str:
        """How the last fit computes, or computed, this average: one line per optimizer."""
        return "\n".join(self._kept.explained)

    def averaged_parameters(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """The average of each parameter that has one, by name; also for an average that is not evaluated."""
        reshard(pl_module)
        averages = self._kept.of_parameters()
        return {name: averages[param] for name, param in pl_module.named_parameters() if param in averages}

    def averaged_state_dict(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """The whole state dict on the CPU, with the average in place of what has one; on every process at once."""
        reshard(pl_module)
        evaluated, weights = self._evaluated(pl_module), copy_weights(pl_module)
        for name, tensor in _named_tensors(pl_module).items():
            if tensor in evaluated and name in weights:
                value = evaluated[tensor]
                whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
                weights[name] = whole.detach().to("cpu", copy=True)
        return weights

    def trained(self, tensor: Tensor) -> Tensor:
        """The trained value of a parameter or buffer of the module, also while the module holds the average."""
        return self._trained.get(tensor, tensor)

    @property
    def num_averaged(self) -> int:
        """Number of updates of the average so far, in the current fit or the last one."""
        average, steps = self._kept.average, self._kept.num_steps
        if not starts_at_a_step(average) or steps < average.start:
            return 0
        return (steps - int(average.start)) // average.every + 1

    @property
    def scheduled_decay(self) -> float | None:
        """The decay that `HyperparameterSchedule("average_decay", ...)` multiplies; None if it does not apply.

        It applies to an EMA that is the first average (except LAWA) of the run.
        """
        return self.average.decay if isinstance(self.average, EMA) and self._kept.name is None else None

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_listed_twice(self, trainer)
        if is_a(trainer.strategy, FSDPStrategy, DeepSpeedStrategy):
            raise ValueError(
                f"{type(self).__name__}({self.average!r}): strategy {type(trainer.strategy).__name__} hides the "
                "parameters; use ModelParallelStrategy (FSDP2) or DDPStrategy."
            )
        if others := [other for kind in _LIGHTNINGS for other in callbacks_of(trainer, kind)]:
            raise ValueError(
                f"{type(self).__name__}({self.average!r}): {type(others[0]).__name__} would put an average into the "
                "module too; use one of the two."
            )
        everyone = callbacks_of(trainer, WeightAveraging)
        evaluated = [repr(callback.average) for callback in everyone if callback.evaluate]
        if len(evaluated) > 1:
            raise ValueError(
                f"{type(self).__name__}(evaluate=True): {' and '.join(evaluated)} would both be evaluated; give all "
                "but one evaluate=False."
            )
        names = names_of([callback.average for callback in everyone])
        self._kept = KeptAverage(self.average, names[everyone.index(self)])
        self._trained, self._batch_norm, self._is_training = {}, None, False
        if self.evaluate:
            self._override(pl_module, "on_save_checkpoint", self._wrap_on_save_checkpoint(pl_module))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.update_bn:  # not earlier: a module may create its layers in `configure_model`
            check_forward(type(self).__name__, pl_module)
        self._at_end(self._kept.detach)
        self._kept.attach(trainer, pl_module if self.average_buffers else None)
        when_training_is_skipped(trainer, self._override, partial(self._show_average, trainer, pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._is_training = True
        average = average_of_run(self.average, Run(trainer))
        warn_if_too_long(type(self).__name__, trainer, average)
        self._kept.begin(average)
        self._knows_batch = not self.update_bn

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._knows_batch:
            check_batch(type(self).__name__, trainer, pl_module, batch)
            self._knows_batch = True

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.training:  # also if only the run that saved it evaluated the average
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            match_averages(trainer, checkpoint, self._kept_by_all(trainer))
            load_trained(trainer, pl_module, checkpoint)
        elif self.evaluate and holds_trained(checkpoint):
            name = type(self).__name__
            rank_zero_info(f"{name}: these weights are the average; the trained ones are the current_model_state.")

    def before_states(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Under FSDP2, when states of optimizers are about to be loaded, which is before `on_load_checkpoint`."""
        name_as_saved(checkpoint, self._kept_by_all(trainer))

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_average(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_trained(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        averages = self._kept.of_parameters() if self.evaluate else {}
        if averages:
            trained = {name: t for name, t in _named_tensors(pl_module).items() if t in self._trained}
            parameters = pl_module.named_parameters(remove_duplicate=False)
            same = {name for name, param in parameters if param not in averages}
            save_trained(trainer, checkpoint, {name: self._trained[t] for name, t in trained.items()}, same)
            self._export(trainer, pl_module, checkpoint)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._show_trained(pl_module)
        super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.evaluate and not self._kept.of_parameters():
            rank_zero_warn(
                f"{type(self).__name__}({self._kept.average!r}): the run ended after {self._kept.num_steps} steps, "
                "before the first update; the module keeps its trained weights."
            )
        self._show_average(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._undo()

    # --- implementation ---

    @staticmethod
    def _kept_by_all(trainer: pl.Trainer) -> dict[str, KeptAverage]:
        return {each.state_key: each._kept for each in callbacks_of(trainer, WeightAveraging)}

    def _evaluated(self, pl_module: pl.LightningModule) -> dict[Tensor, Tensor]:
        """Replacements of the module's parameters and buffers; empty before the first update."""
        averages = self._kept.of_parameters()
        if not averages:
            return {}
        averages |= self._kept.of_buffers(pl_module)
        if self._batch_norm is not None and self._batch_norm[0] == self._kept.num_steps:
            statistics = batch_norms(pl_module)
            averages |= {statistics[name]: value for name, value in self._batch_norm[1].items()}
        return averages

    @torch.no_grad()
    def _show_average(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.evaluate and not self._trained:
            reshard(pl_module)
            averages = self._evaluated(pl_module)
            for tensor, average in averages.items():
                self._trained[tensor] = tensor.detach().clone()
                tensor.copy_(average)
            self._kept.show(averages)
            if self._trained and not trainer.sanity_checking:  # in the sanity check the training data do not exist yet
                self._recompute_batch_norm(trainer, pl_module)

    @torch.no_grad()
    def _show_trained(self, pl_module: pl.LightningModule) -> None:
        reshard(pl_module)
        for tensor, trained in self._trained.items():
            tensor.copy_(trained)
        self._trained = {}
        self._kept.show({})

    def _recompute_batch_norm(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once for each average, with the average in the module."""
        steps = self._kept.num_steps
        if not self.update_bn or (self._batch_norm and self._batch_norm[0] == steps):
            return
        before = {name: buffer.clone() for name, buffer in batch_norms(pl_module).items()}
        recompute_batch_norm_(trainer, pl_module)
        self._batch_norm = steps, {name: buffer.clone() for name, buffer in batch_norms(pl_module).items()}
        for name, buffer in batch_norms(pl_module).items():
            self._trained.setdefault(buffer, before[name])

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the average into the `state_dict` of a checkpoint."""
        if self.update_bn and not self._trained and self._is_training:
            self._show_average(trainer, pl_module)
            self._show_trained(pl_module)
        evaluated, weights = self._evaluated(pl_module), checkpoint["state_dict"]
        for name, tensor in _named_tensors(pl_module).items():
            if tensor in evaluated:
                value = as_saved(trainer, evaluated[tensor].to(tensor.dtype))
                if name in weights:
                    weights[name] = value

    def _wrap_on_save_checkpoint(self, pl_module: pl.LightningModule) -> Callable[[dict[str, Any]], None]:
        """Lightning does not call callbacks if only weights are saved, but it calls the module."""
        original = pl_module.on_save_checkpoint

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            if "callbacks" not in checkpoint and self._kept.of_parameters():
                self._export(pl_module.trainer, pl_module, checkpoint)
            original(checkpoint)

        return on_save_checkpoint

    def _release(self) -> None:
        self._is_training = False  # the average can be read, and saved, after the fit

    def _forget(self) -> None:
        self._is_training, self._trained, self._batch_norm = False, {}, None


def _named_tensors(pl_module: pl.LightningModule) -> dict[str, Tensor]:
    parameters = dict(pl_module.named_parameters(remove_duplicate=False))
    return parameters | dict(pl_module.named_buffers(remove_duplicate=False))
