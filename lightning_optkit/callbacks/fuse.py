# SPDX-License-Identifier: Apache-2.0
"""Turns the optimizers and norms of an unchanged LightningModule into one-pass versions during the fit."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_optkit._checks import check_bools, check_one_of
from lightning_optkit._terminal import fitted
from lightning_optkit._torch_private import set_amp_scaling
from lightning_optkit.callbacks.schedule_free import ScheduleFree
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of, insert_callback
from lightning_optkit.callbacks.seams.configured import optimizers_in
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_packages import is_overridden, loss_scaler
from lightning_optkit.callbacks.seams.norm_swaps import FusedNorms
from lightning_optkit.callbacks.seams.optimizer_names import optimizer_names
from lightning_optkit.callbacks.seams.parameter_numbers import number_by_module
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.run_settings import strategies_in_force
from lightning_optkit.callbacks.seams.steps import StepListener, watch_steps
from lightning_optkit.optimizers._schedule_free import ScheduleFreeOptimizer
from lightning_optkit.optimizers.convert import from_torch_, to_torch_, why_not_convertible
from lightning_optkit.step import Clip, Explanation, OnePassOptimizer
from lightning_optkit.step.arguments import checked_as
from lightning_optkit.step.numbers import ROUNDINGS
from lightning_optkit.step.stages import STATE_DTYPES

__all__ = ["Fuse"]


class Fuse(FitCallback):
    """Converts torch optimizers to one-pass optimizers of the same rule, with `gradient_clip_val` as part of the step.

    Rules: SGD, Adagrad, RMSprop, Adadelta, Adafactor, Adam, AdamW, Adamax, NAdam, RAdam and Muon.

    The optimizer remains the same object, and an instance of its torch class: parameter groups, schedulers, hooks,
    state dicts, checkpoints, and callbacks that check for that class keep working, with or without this callback.
    Optimizers without a one-pass rule, and instances of user-defined subclasses, are not changed, as the printed plan
    says; those of this package keep their own arguments, with a warning if these are others. After the fit every
    optimizer is torch's again and the module is restored. For schedule-free optimizers it adds `ScheduleFree`.

    LayerNorm and RMSNorm layers, of torch or of other packages with the same results, become
    `lightning_optkit.layers.LayerNorm` and `RMSNorm` with the same weights; state dict keys do not change.

    With 16-bit mixed precision and a loss scaler, unscaling is part of the step as well, unless something else reads
    the gradients before the step (an `on_before_optimizer_step` hook, or a module that clips itself): it would get
    scaled gradients, so the scaler's own pass is kept in that case.

    Args:
        rounding: How 16-bit parameters are stored: "nearest", "stochastic", "kahan", "split24" or "split32"; see
            `lightning_optkit.step.Stages` and docs/narrow_state.md, also for fp32 weights after the fit. It wins over
            that of a checkpoint.
        state_dtype: Dtype of the optimizers' moments, torch.float32, torch.bfloat16 or "int8". Checkpoints hold 8-bit
            state in fp32.
        statistics: Collect norms and lost updates per tensor in the same pass.
        verbose: Print the plan when training starts.
        norms: Also convert LayerNorm and RMSNorm layers.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Fuse()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        rounding: Literal["nearest", "stochastic", "kahan", "split24", "split32"] = "nearest",
        state_dtype: torch.dtype | Literal["int8"] = torch.float32,
        statistics: bool = False,
        verbose: bool = True,
        norms: bool = True,
    ) -> None:
        check_one_of(type(self).__name__, "rounding", rounding, ROUNDINGS)
        check_one_of(type(self).__name__, "state_dtype", state_dtype, STATE_DTYPES)
        check_bools(type(self).__name__, statistics=statistics, verbose=verbose, norms=norms)
        self._rounding, self._state_dtype, self._statistics, self._verbose = rounding, state_dtype, statistics, verbose
        self._norms = norms
        self._fused_norms: FusedNorms | None = None
        self._converted: list[OnePassOptimizer] = []
        self._given: list[OnePassOptimizer] = []  # those that are one-pass already
        self._left_alone: list[str] = []
        self._module_clips = self._folds_unscaling = False
        self._clips: dict[Optimizer, Clip] = {}  # the Trainer's clips that are part of a step
        self._is_told = False

    def explain(self) -> list[Explanation]:
        """How each optimizer of the current fit steps."""
        return [optimizer.explain() for optimizer in self._converted]

    def norm_lines(self) -> list[str]:
        """What became of the norms of the module in the current fit, a line each."""
        return [] if self._fused_norms is None else self._fused_norms.lines()

    def fold_clips(self, trainer: pl.Trainer) -> None:
        """Makes the Trainer's current clip part of each step; called before a backward pass that takes steps itself."""
        for optimizer in self._converted if not self._module_clips else ():
            self._fold_clip(optimizer, Run(trainer).clip)

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if callbacks_of(trainer, Fuse, but=self):
            raise ValueError(f"{type(self).__name__}(): given twice; one converts every optimizer.")
        self._undo()  # what the exception of an earlier fit left, if a callback failed to save its checkpoint
        number_by_module(trainer)
        self._converted, self._given, self._left_alone = [], [], []
        self._module_clips = is_overridden("configure_gradient_clipping", pl_module)
        self._override(pl_module, "configure_optimizers", self._wrap_configure_optimizers(pl_module))
        if self._norms:
            self._fused_norms = FusedNorms(pl_module)
            self._at_end(self._fused_norms.undo)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # With manual optimization, a module may clip at any time.
        is_free = pl_module.automatic_optimization and not self._module_clips and not _is_watched(trainer, pl_module)
        self._folds_unscaling, self._is_told = is_free and loss_scaler(trainer) is not None, False
        if not self._module_clips:
            self._override(pl_module, "configure_gradient_clipping", self._wrap_clipping(pl_module))
        joins = partial(self._join, trainer)
        self._at_end(watch_steps(trainer, StepListener(type(self).__name__, joins=joins)).remove)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: later callbacks may add to the step when the training starts.
        if self._verbose and not self._is_told:
            rank_zero_info(fitted(self._plan(trainer)))
        self._is_told = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Not now: OnExceptionCheckpoint, a later callback, saves the optimizers as they step, with what torch's lack.
        self._stand_before(trainer.strategy, "on_exception", partial(self._undo_behind_callbacks, trainer, pl_module))

    # --- implementation ---

    def _undo_behind_callbacks(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        on_exception: Callable[[BaseException], None],
        exception: BaseException,
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        on_exception(exception)

    def _wrap_configure_optimizers(self, pl_module: pl.LightningModule) -> Callable[[], Any]:
        original = pl_module.configure_optimizers

        def configure_optimizers() -> Any:
            configured = original()
            for optimizer in optimizers_in(configured):
                self._convert(optimizer)
                if isinstance(optimizer, ScheduleFreeOptimizer):
                    self._bring_switch(pl_module.trainer)
            return configured

        return configure_optimizers

    def _bring_switch(self, trainer: pl.Trainer) -> None:
        if not callbacks_of(trainer, ScheduleFree):
            self._at_end(insert_callback(trainer, ScheduleFree(), behind=self))

    def _convert(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, OnePassOptimizer):
            self._given.append(optimizer)
            self._warn_of_kept(optimizer)
            return
        reason = why_not_convertible(optimizer)
        if reason is not None:
            self._left_alone.append(f"{type(optimizer).__name__}: {reason}; it runs as it is")
            return
        with checked_as(type(optimizer).__name__, type(self).__name__):
            from_torch_(optimizer, rounding=self._rounding, state_dtype=self._state_dtype, statistics=self._statistics)
        assert isinstance(optimizer, OnePassOptimizer)
        self._converted.append(optimizer)
        self._at_end(partial(to_torch_, optimizer))

    def _warn_of_kept(self, optimizer: OnePassOptimizer) -> None:
        """Of arguments that an optimizer of this package does not take from here."""
        roundings = {group["rounding"] for group in optimizer.param_groups}
        kept = (
            ("rounding", self._rounding, "nearest", roundings),
            ("state_dtype", self._state_dtype, torch.float32, {optimizer.state_dtype}),
            ("statistics", self._statistics, False, {optimizer.record_statistics}),
        )
        for name, given, default, own in kept:
            if given != default and own != {given}:
                rank_zero_warn(
                    f"{type(self).__name__}({name}={given!r}): the {type(optimizer).__name__} of the module is one of "
                    f"this package, and keeps its own {name}: {', '.join(map(repr, own))}. Give it {name}={given!r}."
                )

    def _join(self, trainer: pl.Trainer, optimizer: Optimizer, place: int) -> None:
        if optimizer in self._converted:
            set_amp_scaling(optimizer, self._folds_unscaling)
            if not self._module_clips:
                self._fold_clip(optimizer, Run(trainer).clip)
        elif not self._module_clips:
            _refuse_two_clips(optimizer, trainer)

    def _fold_clip(self, optimizer: Optimizer, clip: Clip | None) -> None:
        """Makes the Trainer's clip part of the step, unless the optimizer has another one."""
        assert isinstance(optimizer, OnePassOptimizer)
        ours = self._clips.get(optimizer)
        if clip != ours and optimizer.clip is ours:
            optimizer.clip = clip
            self._clips.pop(optimizer, None)
            self._clips |= {} if clip is None else {optimizer: clip}

    def _wrap_clipping(self, pl_module: pl.LightningModule) -> Callable[..., None]:
        original = pl_module.configure_gradient_clipping
        is_lightnings = not is_overridden("configure_gradient_clipping", pl_module)  # or overridden by another callback

        def configure_gradient_clipping(
            optimizer: Optimizer,
            gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None,
        ) -> None:
            if optimizer in self._converted:
                self._fold_clip(optimizer, Run(pl_module.trainer).clip)  # it may have been set since
            elif is_lightnings:
                _refuse_two_clips(optimizer, pl_module.trainer)
            if optimizer not in self._converted or not is_lightnings:
                original(optimizer, gradient_clip_val, gradient_clip_algorithm)

        return configure_gradient_clipping

    def _plan(self, trainer: pl.Trainer) -> str:
        places = {optimizer: place for place, optimizer in enumerate(trainer.optimizers)}
        names = optimizer_names(trainer)
        parts = []
        for optimizer in (*self._converted, *self._given):
            several = len(places) > 1 and optimizer in places
            place = places.get(optimizer, 0)
            which = f"Fuse, optimizer {place} of {len(places)}, {names[place]}" if several else "Fuse"
            if optimizer in self._given:
                which += f"{',' if several else ''} left {type(optimizer).__name__}: one-pass already"
            parts.append(f"{which}: {optimizer.explain()}")
        parts += [f"Fuse left {line}." for line in self._left_alone]
        parts += [f"Fuse norms: {line}." for line in self.norm_lines()]
        in_force = strategies_in_force(trainer, but=self)
        parts += ["in force besides:", *in_force] if in_force else []
        return "\n".join(parts or ["Fuse: this module has no optimizer."])

    def _forget(self) -> None:
        self._fused_norms, self._converted, self._given, self._clips = None, [], [], {}


def _refuse_two_clips(optimizer: Optimizer, trainer: pl.Trainer) -> None:
    """Raises ValueError if the Trainer clips what the optimizer's own clip then measures."""
    if Run(trainer).clip is not None and isinstance(optimizer, OnePassOptimizer) and optimizer.clip is not None:
        raise ValueError(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}): {type(optimizer).__name__}"
            f"(clip={optimizer.clip!r}) clips too; keep one."
        )


def _is_watched(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether something reads the gradients before the step, and so needs them unscaled."""
    watchers: list[Any] = [pl_module, *callbacks_of(trainer, object)]
    return any(is_overridden("on_before_optimizer_step", watcher) for watcher in watchers)
