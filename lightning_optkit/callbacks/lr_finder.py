# SPDX-License-Identifier: Apache-2.0
"""Finds a learning rate before training, by a range test."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_optkit._checks import check_bools, check_in, check_int, check_one_of
from lightning_optkit.callbacks.scheduling.existing_schedulers import schedulers_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_private import accumulates
from lightning_optkit.callbacks.seams.refusals import refuse_split_parameters, refuse_twice
from lightning_optkit.callbacks.seams.run import Run, has_lazy_parameters
from lightning_optkit.callbacks.seams.trial_fit import trial_fit
from lightning_optkit.diagnostics.lr_range import RULES, LRRange, lr_range

__all__ = ["LRFinder"]

_NO_LOSS = "no batch of the test had a loss (is there a batch, and does training_step return one?)"
_NOT_FINITE = (
    "the loss is infinite or NaN at the smallest rate already, so the rate is not why; run with GradientHealth or "
    "`optkit doctor`"
)
_DIVERGED = 4.0  # times the fall so far, above the first losses


class LRFinder(FitCallback):
    """Trains a few steps at growing learning rates, brings the run back to its start, and trains at the rate found.

    Unlike Lightning's `LearningRateFinder`, it keeps the ratios between the rates of parameter groups, sets the base
    rates of the module's schedulers and of `LRSchedule`, judges the slope per factor of the rate, may need more steps
    than an epoch has, restores the random state (the run is the one that the suggested rate gives without a finder),
    and writes no file. A resumed run keeps the rates of its checkpoint. Put it last: what other callbacks do when the
    fit starts (fused optimizers, clipping) is then part of the test.

    After the fit starts, `result` has rates, losses and suggestions, and `result.plot()` draws them; without a
    suggestion (the loss does not fall, the module sets its rate itself, the run is resumed) `result.reason` says why.

    Args:
        min_lr: Smallest rate of the test, in (0, inf): that of the group with the largest rate; the others keep their
            ratio to it.
        max_lr: Largest rate of the test, above `min_lr`.
        num_steps: Optimizer steps of the test, at least 20.
        suggestion: The rule whose rate is used: "middle", "steepest", "valley" or "minimum"; see `lr_range`.
        apply: Set the rate. False: only print what was found.
        verbose: Print the suggestions.

    Raises:
        ValueError: for an argument out of range; when the fit starts, with manual optimization, for a strategy that
            splits parameters over processes, for layers that wait for their first input, or if there are two of it.

    Cost: `num_steps` steps, and a copy of weights, optimizer state and callback states in memory during the test.

    Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, section 3.3.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LRFinder(num_steps=100)], logger=False, enable_checkpointing=False)
    """

    result: LRRange | None = None

    def __init__(
        self,
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        num_steps: int = 100,
        suggestion: Literal["middle", "steepest", "valley", "minimum"] = "middle",
        *,
        apply: bool = True,
        verbose: bool = True,
    ) -> None:
        owner = type(self).__name__
        self.min_lr = check_in(owner, "min_lr", min_lr, "(0, inf)")
        self.max_lr = check_in(owner, "max_lr", max_lr, "(0, inf)")
        if self.max_lr <= self.min_lr:
            raise ValueError(f"{owner}(max_lr={max_lr!r}): max_lr must be above min_lr, which is {min_lr!r}.")
        self.num_steps = check_int(owner, "num_steps", num_steps, minimum=20)
        check_one_of(owner, "suggestion", suggestion, RULES)
        check_bools(owner, apply=apply, verbose=verbose)
        self.suggestion, self.apply, self.verbose = suggestion, apply, verbose

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        owner = type(self).__name__
        refuse_twice(self, trainer)
        refuse_split_parameters(self, trainer)
        if not pl_module.automatic_optimization:
            raise ValueError(f"{owner}(): needs automatic optimization; a module that steps by itself sets its rates.")
        if Run(trainer).is_trial or Run(trainer).is_resuming:
            resumed = "a run resumed from a checkpoint keeps its rates"
            trial = "the run is a trial (fast_dev_run, or no steps at all)"
            self.result = _nothing(f"not tested, since {resumed if Run(trainer).is_resuming else trial}")
            return
        if has_lazy_parameters(pl_module):
            raise ValueError(
                f"{owner}(): a layer still waits for its first input (lazy), so its weights could not return after "
                "the test; run a batch through the network in configure_model."
            )
        if not trainer.optimizers:
            raise ValueError(f"{owner}(): configure_optimizers of {type(pl_module).__name__} gives no optimizer.")
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        bases = [float(group["lr"]) for group in groups]
        if max(bases, default=0.0) <= 0:
            raise ValueError(f"{owner}(): at least one parameter group must have a rate above 0, for the ratios.")
        sweep = _Sweep([base / max(bases) for base in bases], self._rates())
        if not trial_fit(trainer, sweep, self.num_steps):
            rank_zero_warn(
                f"{owner}(num_steps={self.num_steps}): the test ended after {len(sweep.losses)} steps with an epoch "
                "without a batch; data that can be read only once are used up, so find the rate in a run of its own."
            )
        losses = trainer.strategy.broadcast(sweep.losses)  # all processes must choose the same rate
        reason = sweep.reason or ("" if losses else _NO_LOSS)
        if losses and not math.isfinite(losses[0]):
            reason = _NOT_FINITE
        self.result = _nothing(reason) if reason else lr_range(self._rates()[: len(losses)], losses)
        if self.verbose:
            rank_zero_info(self._text(self.result, max(bases)))
        chosen = self.result.suggestions[self.suggestion]
        if self.apply and chosen is not None:
            _set_rates(trainer, chosen, max(bases))

    def _rates(self) -> list[float]:
        low, high = math.log(self.min_lr), math.log(self.max_lr)  # whose ratio may be more than a number can hold
        rates = [math.exp(low + (high - low) * step / (self.num_steps - 1)) for step in range(self.num_steps)]
        return [self.min_lr, *rates[1:-1], self.max_lr]

    def _text(self, result: LRRange, before: float) -> str:
        owner = type(self).__name__
        if result.reason:
            return f"{owner}: no suggestion, the rate stays {before:.3g}: {result.reason}."
        found = ", ".join(f"{name} {lr:.3g}" for name, lr in result.suggestions.items() if lr is not None)
        chosen = result.suggestions[self.suggestion]
        does = f"the rate is now {chosen:.3g} ({self.suggestion})" if self.apply else f"the rate stays {before:.3g}"
        return (
            f"{owner}: {found}; {does}, {before:.3g} before. Tested {len(result.lrs)} rates up to {result.lrs[-1]:.3g}."
        )


class _Sweep(pl.Callback):
    """Sets the rates of each step, and keeps the losses."""

    def __init__(self, ratios: list[float], rates: list[float]) -> None:
        self._ratios, self._rates = ratios, rates
        self._window: list[Tensor] = []
        self.losses: list[float] = []
        self.reason = ""  # why the losses say nothing

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rate = self._rates[min(len(self.losses), len(self._rates) - 1)]
        self._written = [(group, rate * ratio) for group, ratio in zip(groups, self._ratios, strict=False)]
        for group, value in self._written:
            _write(group, "lr", value)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._window.append(loss.detach().float() * trainer.accumulate_grad_batches)  # divided by it for backward
        if accumulates(trainer) or not self._window:
            return
        if not all(math.isclose(float(group["lr"]), value, rel_tol=1e-5) for group, value in self._written):
            self.reason = f"{type(pl_module).__name__} sets the rate in each step itself"
            trainer.should_stop = True
            return
        mean = torch.stack(self._window).mean()
        self._window = []
        self.losses.append(float(trainer.strategy.reduce(mean, reduce_op="mean")))
        trainer.should_stop = trainer.strategy.broadcast(self._has_diverged())

    def _has_diverged(self) -> bool:
        if not math.isfinite(self.losses[-1]):
            return True
        several = max(len(self._rates) // 20, 3)
        first, last = (sum(losses) / several for losses in (self.losses[:several], self.losses[-several:]))
        return len(self.losses) > 2 * several and last > first + _DIVERGED * max(
            first - min(self.losses), abs(first) / 4
        )


def _nothing(reason: str) -> LRRange:
    """A result without suggestions."""
    return LRRange((), (), (), dict.fromkeys(RULES), reason)


def _set_rates(trainer: pl.Trainer, rate: float, before: float) -> None:
    """Scales the rates of all groups, and those that schedulers start from, so that `before` becomes `rate`."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr", "max_lr", "min_lr"):
                if name in group:
                    _write(group, name, rate * (float(group[name]) / before))
            if "decay_lr" in group:
                group["decay_lr"] = float(group["lr"])
    for scheduler in schedulers_of(trainer):
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate * (value / before) for value in scheduler.base_lrs]


def _write(group: dict[str, Any], name: str, value: float) -> None:
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value
