# SPDX-License-Identifier: Apache-2.0
"""Keeps an average of the weights, and lets validation, test, prediction and checkpoints see it."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optkit._checks import check_one_of
from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.averaging.own_pass import (
    AnyAverage,
    averages_of,
    protect_average,
    read_average,
    update_average_,
    update_tensors_,
)
from lightning_optkit.callbacks._batch_norm import batch_norms, check_forward, recompute_batch_norm_
from lightning_optkit.callbacks._overrides import override, restore
from lightning_optkit.callbacks._weight_files import as_saved, load_trained, save_trained
from lightning_optkit.step import OnePassOptimizer

__all__ = ["WeightAveraging"]


class WeightAveraging(Callback):
    """Averages the weights over training: folded into a one-pass step, in a pass of its own after any other step.

    The average lives in the optimizer's state: sharded where the parameters are (`ModelParallelStrategy`), and in every
    full checkpoint. From its first update on, and never before, validation runs on it, the `state_dict` of every
    checkpoint holds it (with the trained weights beside it, for resuming, under `current_model_state`), and the module
    has it when `fit` returns. A checkpoint of `save_weights_only=True` holds the average alone; for the trained weights
    save a full one and read its `current_model_state`. If the average never began, all of them hold the trained
    weights, and a warning says so.

    Several may stand side by side with different averages; one of them is evaluated. The first `EMA` or `SWA` is
    folded into the step, the others (and `LAWA`) take a pass of their own: see `explain`. A checkpoint is resumed with
    the same averages in the same order.

    Buffers of integers are the model's own. So are buffers of floating point numbers, unless one of the two options
    says otherwise.

    Args:
        average: What to keep: `EMA(0.999)`, `SWA(0.75)` or `LAWA(6, every=100)`.
        evaluate: Whether it is this average that validation and checkpoints see, and the module holds at the end.
        average_buffers: Average the buffers of floating point numbers as well.
        update_bn: Recompute the running statistics of BatchNorm for the average before it is evaluated, saved, or left
            in the module: one pass over the training data by `forward` on the first item of each batch, once for each
            average, merged over the processes. What the training itself tracks is left alone.

    Raises:
        ValueError: when the fit starts, for two that would be evaluated, for an optimizer that keeps another average,
            or for a strategy that hides the parameters.

    Example:
        >>> from lightning_optkit.averaging import EMA
        >>> trainer = pl.Trainer(callbacks=[WeightAveraging(EMA(0.99))], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        average: EMA | SWA | LAWA,
        evaluate: bool = True,
        average_buffers: bool = False,
        update_bn: bool = False,
    ) -> None:
        if not hasattr(average, "state_name"):
            raise TypeError(f"WeightAveraging(average={average!r}): average must be one such as EMA(0.999).")
        for name, value in (("evaluate", evaluate), ("average_buffers", average_buffers), ("update_bn", update_bn)):
            check_one_of("WeightAveraging", name, value, (False, True))
        if update_bn and not evaluate:
            raise ValueError(
                "WeightAveraging(update_bn=True): evaluate must be True; nothing else uses the statistics."
            )
        self.average, self.evaluate, self.average_buffers, self.update_bn = (
            average,
            evaluate,
            average_buffers,
            update_bn,
        )
        self._running: AnyAverage = average  # with `start` as a step of this run
        self._name: str | None = None  # in the state, beside another average
        self._optimizers: list[Optimizer] = []
        self._explained: list[str] = []
        self._folding: list[tuple[OnePassOptimizer, Any]] = []  # and what it kept before the fit
        self._hooks: list[RemovableHandle] = []
        self._on_module_save: Callable[..., Any] | None = None
        self._steps = self._counted = 0  # done; those of them that are not in `num_steps` of a one-pass optimizer
        self._in_training = False
        self._trained: dict[Tensor, Tensor] = {}  # while the module holds the average: what it was trained to
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._batch_norm: tuple[int, dict[str, Tensor]] | None = None  # statistics, and the step they belong to

    @property
    def state_key(self) -> str:
        """Two averages in one run keep their own state."""
        return self._generate_state_key(average=repr(self.average))

    def state_dict(self) -> dict[str, Any]:
        """Optimizer steps so far, for averages that are not updated by every one; its name; averages of buffers."""
        return {"steps": self._num_steps(), "name": self._name, "buffers": self._buffers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it.

        Raises:
            ValueError: if the checkpoint knows this average under another name.
        """
        if state_dict.get("name") != self._name:
            raise ValueError(
                f"WeightAveraging({self.average!r}): in the checkpoint its state is "
                f"{state_dict.get('name') or self.average.state_name!r}, here {self._name or self.average.state_name!r}"
                "; give the averages in the order of the run that saved it."
            )
        self._steps = self._counted = state_dict["steps"]
        self._buffers = state_dict.get("buffers", {})

    def explain(self) -> str:
        """How the last fit keeps, or kept, this average: one line per optimizer."""
        return "\n".join(self._explained)

    def averaged_parameters(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """The average by name of the parameter, of those that have one; also of an average that is not evaluated."""
        averages = self._averages()
        return {name: averages[param] for name, param in pl_module.named_parameters() if param in averages}

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._trained, self._buffers, self._batch_norm = {}, {}, None
        self._steps = self._counted = 0
        self._in_training, self._running = False, self.average
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ValueError(
                f"WeightAveraging({self.average!r}): strategy {type(trainer.strategy).__name__} hides the parameters; "
                "use ModelParallelStrategy (FSDP2) or DDPStrategy."
            )
        everyone = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore[attr-defined]
        self._name = _names(everyone)[everyone.index(self)]
        evaluated = [repr(callback.average) for callback in everyone if callback.evaluate]
        if len(evaluated) > 1:
            raise ValueError(
                f"WeightAveraging(evaluate=True): {' and '.join(evaluated)} would both be evaluated; give all but one "
                "evaluate=False."
            )
        if self.update_bn:
            check_forward(pl_module)
        if self.evaluate:
            self._on_module_save = self._wrap_on_save_checkpoint(pl_module)
            override(pl_module, "on_save_checkpoint", self._on_module_save)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(self.average, SWA) and isinstance(self.average.start, float):
            self._running = self.average.for_run(trainer.estimated_stepping_batches)
        self._optimizers = list(trainer.optimizers)
        self._explained = []
        for optimizer in self._optimizers:
            reason = self._why_not_folded(optimizer)
            how = "folded into the step" if reason is None else f"a pass of its own ({reason}) after the step"
            kept_as = self._name or self.average.state_name
            self._explained.append(f"{self._running!r}: {how} of {type(optimizer).__name__}, as state {kept_as!r}.")
            if reason is None:
                self._fold_into(optimizer)
            else:
                self._hooks.append(optimizer.register_step_post_hook(self._after_step))
                self._hooks += protect_average(optimizer, self._running, self._name)
        if self.average_buffers:
            self._hooks.append(self._optimizers[0].register_step_post_hook(self._average_buffers(pl_module)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._in_training = True
        # A run that was begun in another way may have left state without a step count.
        for optimizer, _ in self._folding if self._steps else ():
            optimizer.resume_counting(self._steps)
        first = self._optimizers[0] if self._optimizers else None
        self._counted = self._steps - (first.num_steps if isinstance(first, OnePassOptimizer) else 0)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.training and self.evaluate:
            load_trained(trainer, pl_module, checkpoint)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_average(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show_trained()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.evaluate and self._averages():
            trained = {name: t for name, t in _named_tensors(pl_module).items() if t in self._trained}
            save_trained(trainer, checkpoint, {name: self._trained[t] for name, t in trained.items()})
            self._export(trainer, pl_module, checkpoint)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._show_trained()
        self._undo(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.evaluate and not self._averages():
            rank_zero_warn(
                f"WeightAveraging({self._running!r}): the run ended after {self._num_steps()} steps, before the first "
                "update; the module keeps its trained weights."
            )
        self._show_average(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._undo(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._undo(pl_module)

    # --- what they do: keep ---

    def _why_not_folded(self, optimizer: Optimizer) -> str | None:
        if isinstance(self.average, LAWA):
            return "no step keeps snapshots"
        if not isinstance(optimizer, OnePassOptimizer):
            return "not a one-pass optimizer"
        return "the step keeps another average" if self._name else None

    def _fold_into(self, optimizer: Optimizer) -> None:
        assert isinstance(optimizer, OnePassOptimizer)
        if optimizer.average is not None and optimizer.average != self._running:
            raise ValueError(
                f"WeightAveraging({self.average!r}): {type(optimizer).__name__} keeps {optimizer.average!r} already; "
                "leave one of the two out."
            )
        self._folding.append((optimizer, optimizer.average))
        optimizer.keep_average(self._running)  # type: ignore[arg-type]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._in_training:
            # A sharded checkpoint is read into the state that a first, empty step makes.
            update_average_(optimizer, self._running, 0, self._name)
        elif optimizer is not self._optimizers[0] or self._count(optimizer):
            update_average_(optimizer, self._running, self._steps, self._name)

    def _count(self, optimizer: Optimizer) -> bool:
        """Counts a step, unless it was skipped."""
        before = self._steps
        if isinstance(optimizer, OnePassOptimizer):
            self._steps = self._counted + optimizer.num_steps
        else:
            found_inf = getattr(optimizer, "found_inf", None)
            self._steps += found_inf is None or float(found_inf) == 0
        return self._steps > before

    def _num_steps(self) -> int:
        if not self._folding or not self._in_training:
            return self._steps
        first = self._optimizers[0]
        if isinstance(first, OnePassOptimizer):
            return self._counted + first.num_steps
        # Fuse has undone its work already, as it does when something fails; the state still counts.
        return max((int(state.get("step", 0)) for state in first.state.values()), default=0)

    def _average_buffers(self, pl_module: pl.LightningModule) -> Callable[[Optimizer, Any, Any], None]:
        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if self._in_training and (not self._folding or self._count(optimizer)):
                kept = [
                    (buffer, self._buffers.setdefault(name, {}))
                    for name, buffer in pl_module.named_buffers()
                    if buffer.dtype.is_floating_point
                ]
                update_tensors_(kept, self._running, self._steps, self._name)

        return after_step

    def _averages(self) -> dict[Tensor, Tensor]:
        """The average of every parameter that has one with at least one update."""
        averages: dict[Tensor, Tensor] = {}
        for optimizer in self._optimizers:
            averages |= averages_of(optimizer, self._running, self._name)
        return averages

    # --- what they do: show ---

    def _evaluated(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[Tensor, Tensor]:
        """What stands in for the parameters and buffers of the module: nothing before the first update."""
        averages = self._averages()
        if not averages:
            return {}
        buffers = dict(pl_module.named_buffers())
        for name, state in self._buffers.items():
            value = read_average(state, self._running, self._name)
            if value is not None and name in buffers:
                averages[buffers[name]] = value
        if self._batch_norm is not None and self._batch_norm[0] == self._num_steps():
            averages |= {buffers[name]: value for name, value in self._batch_norm[1].items()}
        return averages

    def _recompute_batch_norm(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once for each average, with the average in the module."""
        steps = self._num_steps()
        if not self.update_bn or (self._batch_norm and self._batch_norm[0] == steps):
            return
        before = {name: buffer.clone() for name, buffer in batch_norms(pl_module).items()}
        recompute_batch_norm_(trainer, pl_module)
        self._batch_norm = steps, {name: buffer.clone() for name, buffer in batch_norms(pl_module).items()}
        for name, buffer in batch_norms(pl_module).items():
            self._trained.setdefault(buffer, before[name])

    @torch.no_grad()
    def _show_average(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.evaluate and not self._trained:
            for tensor, average in self._evaluated(trainer, pl_module).items():
                self._trained[tensor] = tensor.detach().clone()
                tensor.copy_(average)
            if self._trained and not trainer.sanity_checking:  # the training data are not there yet
                self._recompute_batch_norm(trainer, pl_module)

    @torch.no_grad()
    def _show_trained(self) -> None:
        for tensor, trained in self._trained.items():
            tensor.copy_(trained)
        self._trained = {}

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the average into the `state_dict` of a checkpoint."""
        if self.update_bn and not self._trained and self._in_training:
            self._show_average(trainer, pl_module)
            self._show_trained()
        evaluated, weights = self._evaluated(trainer, pl_module), checkpoint["state_dict"]
        for name, tensor in _named_tensors(pl_module).items():
            if tensor in evaluated:
                value = as_saved(trainer, evaluated[tensor].to(tensor.dtype))
                if name in weights:
                    weights[name] = value

    def _wrap_on_save_checkpoint(self, pl_module: pl.LightningModule) -> Callable[[dict[str, Any]], None]:
        """Callbacks are not asked when only weights are saved; the module is."""
        original = pl_module.on_save_checkpoint

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            if "callbacks" not in checkpoint and self._averages():
                self._export(pl_module.trainer, pl_module, checkpoint)
            original(checkpoint)

        return on_save_checkpoint

    def _undo(self, pl_module: pl.LightningModule) -> None:
        self._steps = self._num_steps()
        self._in_training = False
        restore(pl_module, "on_save_checkpoint", self._on_module_save)
        self._on_module_save = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for optimizer, kept_before in self._folding:
            if isinstance(optimizer, OnePassOptimizer):  # Fuse may have undone it before
                optimizer.keep_average(kept_before)
        self._folding = []


def _named_tensors(pl_module: pl.LightningModule) -> dict[str, Tensor]:
    parameters = dict(pl_module.named_parameters(remove_duplicate=False))
    return parameters | dict(pl_module.named_buffers(remove_duplicate=False))


def _names(everyone: list[WeightAveraging]) -> list[str | None]:
    """Names in the state: its own for the first that a step can keep and for the first LAWA, numbered for the rest."""
    names: list[str | None] = []
    seen: set[bool] = set()
    for number, callback in enumerate(everyone, start=1):
        folds = not isinstance(callback.average, LAWA)
        names.append(f"{callback.average.state_name}_{number}" if folds in seen else None)
        seen.add(folds)
    return names
