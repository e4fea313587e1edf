# SPDX-License-Identifier: Apache-2.0
"""Updates each parameter inside the backward pass of an unchanged run, so that gradients are never all in memory."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit.callbacks._combined_gradient import CombinedGradientSAM
from lightning_optkit.callbacks.exact_resume import ExactResume
from lightning_optkit.callbacks.fuse import Fuse
from lightning_optkit.callbacks.gradient_clipping import GradientClipping
from lightning_optkit.callbacks.report import Report
from lightning_optkit.callbacks.sam import SAM
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_packages import is_a, is_overridden, loss_scaler
from lightning_optkit.callbacks.seams.refusals import refuse_manual_optimization, refuse_twice
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.steps import StepListener, watch_steps
from lightning_optkit.optimizers.convert import one_pass_class, why_not_convertible
from lightning_optkit.step import OnePassOptimizer, StepInBackward

__all__ = ["ReleaseGradients"]

_READERS = ("on_after_backward", "on_before_optimizer_step")


class ReleaseGradients(FitCallback):
    """Updates each parameter as soon as the backward pass has its gradient, and frees the gradient.

    The largest gradient is in memory instead of all of them: for bf16 weights 2 bytes per parameter less, for fp32
    weights 4. The numbers are those of the ordinary step, bit for bit, while all gradients are finite: with
    `ClipPerTensor` and `ClipUnitwise` a parameter whose gradient is not finite is skipped alone, since the others may
    have been updated before it, where an ordinary step skips all. Schedules, averages folded into the step,
    checkpoints and resuming work as usual.

    It needs one-pass optimizers: add `Fuse()`, or create optimizers of this package. On one device, or with
    `ModelParallelStrategy` (FSDP2). Whatever needs all gradients of a step, or changes them before it, is refused: a
    clip by the global norm (use `GradientClipping(ClipPerTensor(...))`, or `gradient_clip_algorithm="value"`), gradient
    accumulation, a loss scaler, SAM (not its variants), noise, an average in a pass of its own, and hooks between the
    backward pass and the step.

    Raises:
        ValueError: when the fit or its training starts, or when it is first known, for what is refused.
        RuntimeError: if a parameter gets two gradients in one step.

    Source: Lv et al. 2023, arXiv:2306.09782.

    Example:
        >>> from lightning_optkit.callbacks import Fuse
        >>> trainer = pl.Trainer(callbacks=[Fuse(), ReleaseGradients()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._handles: dict[Optimizer, StepInBackward] = {}

    @property
    def _owner(self) -> str:
        return f"{type(self).__name__}()"

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_twice(self, trainer)
        refuse_manual_optimization(self, pl_module, "it may call backward several times for a step")
        if not is_a(trainer.strategy, SingleDeviceStrategy, ModelParallelStrategy):
            raise ValueError(
                f"{self._owner}: {type(trainer.strategy).__name__} may still change a gradient that the backward pass "
                "has completed; use one device, or ModelParallelStrategy (FSDP2)."
            )
        if loss_scaler(trainer) is not None:
            raise ValueError(f"{self._owner}: a loss scaler must see all gradients before any step; train in bf16.")
        if is_overridden("configure_gradient_clipping", pl_module):  # not later: Fuse overrides it too
            self._refuse_hook(pl_module, "configure_gradient_clipping")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: only now is it known what every callback adds to the step.
        self._check_hooks(trainer, pl_module)
        self._check_window(trainer)
        joins = partial(self._join, trainer)
        self._at_end(self._put_back)
        self._at_end(watch_steps(trainer, StepListener(type(self).__name__, joins=joins)).remove)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for handle in self._handles.values():
            handle.follow()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        # Asked each time, since both may be set during the run.
        self._check_window(trainer)
        for fuse in callbacks_of(trainer, Fuse):
            fuse.fold_clips(trainer)
        for optimizer in self._handles:
            self._check_clip(trainer, optimizer)

    # --- implementation ---

    def _join(self, trainer: pl.Trainer, optimizer: Optimizer, place: int) -> None:
        for gone in [known for known in self._handles if known not in trainer.optimizers]:
            self._handles.pop(gone).remove()
        trained = {param for group in optimizer.param_groups for param in group["params"]}
        if trained.isdisjoint(trainer.lightning_module.parameters()):  # Lightning's stand-in for no optimizer at all
            return
        if not isinstance(optimizer, OnePassOptimizer):
            reason = why_not_convertible(optimizer)
            remedy = "add Fuse(), or use" if one_pass_class(type(optimizer)) and reason is None else "use"
            because = "" if reason is None else f" ({reason})"
            raise ValueError(
                f"{self._owner}: {type(optimizer).__name__} has no one-pass step{because}; {remedy} an optimizer of "
                "lightning_optkit."
            )
        self._check_clip(trainer, optimizer)
        owner = f"{type(self).__name__}(...)"
        self._handles[optimizer] = StepInBackward(optimizer, once_per_step=True, owner=owner)

    def _check_hooks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(not is_a(callback, CombinedGradientSAM) for callback in callbacks_of(trainer, SAM)):
            raise ValueError(f"{self._owner}: SAM restores the weights after the backward pass; leave one of them out.")
        # Both look at no gradient there that a step of the backward pass has freed.
        callbacks = [callback for callback in callbacks_of(trainer, object) if not is_a(callback, Report, ExactResume)]
        for watcher in (pl_module, *callbacks):
            for name in _READERS:
                if is_overridden(name, watcher):
                    self._refuse_hook(watcher, name)

    def _refuse_hook(self, watcher: object, name: str) -> None:
        raise ValueError(
            f"{self._owner}: {type(watcher).__name__}.{name} is called when every gradient has been used and freed; "
            "leave it out."
        )

    def _check_window(self, trainer: pl.Trainer) -> None:
        window = trainer.accumulate_grad_batches
        if window != 1:
            raise ValueError(
                f"{self._owner}: Trainer(accumulate_grad_batches={window}) adds up the gradients of several batches, "
                "which are freed here after each; accumulate no batches."
            )
        for scheduler in callbacks_of(trainer, GradientAccumulationScheduler):
            if set(scheduler.scheduling.values()) != {1}:
                raise ValueError(
                    f"{self._owner}: GradientAccumulationScheduler({scheduler.scheduling}) adds up the gradients of "
                    "several batches, which are freed here after each; leave it out."
                )

    def _check_clip(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        assert isinstance(optimizer, OnePassOptimizer)
        theirs, own = Run(trainer).clip, optimizer.clip
        if own is not None and own.needs_norm and not own.bounds.limits_parts:
            raise ValueError(
                f"{self._owner}: {own!r} needs the norm of all gradients, which are never there together; use "
                'GradientClipping(ClipPerTensor(...)), or Trainer(gradient_clip_algorithm="value").'
            )
        if theirs is not None and theirs != own:
            raise ValueError(
                f"{self._owner}: {theirs!r} of the Trainer is no part of the step of {type(optimizer).__name__}; add "
                "Fuse(), or use GradientClipping."
            )
        if callbacks_of(trainer, GradientClipping) and own is None:
            raise ValueError(
                f"{self._owner}: GradientClipping takes a pass of its own over the gradients; leave it out."
            )

    def _put_back(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def _forget(self) -> None:
        self._handles = {}
