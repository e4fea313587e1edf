# SPDX-License-Identifier: Apache-2.0
"""Finds a learning rate before training, by a range test."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_optkit._checks import check_bools, check_in, check_int, check_one_of
from lightning_optkit.callbacks._steps_at_rates import StepsAtRates, bases_of, set_rates
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.refusals import refuse_split_parameters, refuse_twice
from lightning_optkit.callbacks.seams.run import Run, has_lazy_parameters
from lightning_optkit.callbacks.seams.trial_fit import TrialFits
from lightning_optkit.diagnostics._rate_trials import TRAINED, RateTrial, best_of, ladder, loss_of, trials_of
from lightning_optkit.diagnostics.lr_range import RULES, LRRange, lr_range, stands_alone

__all__ = ["LRFinder"]

_NO_LOSS = "no batch of the test had a loss (is there a batch, and does training_step return one?)"
_NOT_FINITE = (
    "the loss is infinite or NaN at the smallest rate already, so the rate is not why; run with GradientHealth or "
    "`optkit doctor`"
)
_NONE_TRAINED = "the loss diverged, or the data ended, in the trainings at all rates around those of the range test"


class LRFinder(FitCallback):
    """Trains a few steps at growing learning rates, brings the run back to its start, and trains at the rate found.

    Unlike Lightning's `LearningRateFinder`, it keeps the ratios between the rates of parameter groups, sets the base
    rates of the module's schedulers and of `LRSchedule`, judges the slope per factor of the rate, may need more steps
    than an epoch has, restores the random state (the run is the one that the suggested rate gives without a finder),
    also that of generators that data and module have of their own, and writes no file. The rate found is the one that a
    schedule multiplies, and of OneCycleLR and CyclicLR the largest; the first step of a warm-up has less. A resumed run
    keeps the rates of its checkpoint. Put it last: what other callbacks do when the fit starts (fused optimizers,
    clipping) is then part of the test.

    After the fit starts, `result` has rates, losses and suggestions, and `result.plot()` draws them; without a
    suggestion (the loss does not fall, the module sets its rate itself, the run is resumed) `result.reason` says why.
    A warning says that the rules are far apart, by more than 10 times from the one used: "trained" decides then.

    Args:
        min_lr: Smallest rate of the test, in (0, inf): that of the group with the largest rate; the others keep their
            ratio to it.
        max_lr: Largest rate of the test, above `min_lr`.
        num_steps: Optimizer steps of the test, at least 20.
        suggestion: The rule whose rate is used: "middle", "steepest", "valley" or "minimum", see `lr_range`; or
            "trained": of some 10 rates around these, the one that trains best. All training begins at the start of the
            run, with the same batches: first at rates a factor of 3 apart, then longer beside the best.
        trial_steps: Steps of the longest of these trainings, at least 40. Default: 200. More tell more about a long
            run.
        apply: Set the rate. False: only print what was found.
        verbose: Print the suggestions.

    Raises:
        ValueError: for an argument out of range; when the fit starts, with manual optimization, for a strategy that
            splits parameters over processes, for layers that wait for their first input, or if there are two of it.

    With "trained", `trials` has rate, steps and loss of each training.

    Cost: `num_steps` steps, and a copy of weights, optimizer state and callback states in memory during the test. With
    "trained" some 6 times `trial_steps` more (at most 7), and the loaders are started for each of some 14 trainings.

    Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, section 3.3; for
    "trained" successive halving, Jamieson, Talwalkar 2016, arXiv:1502.07943.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LRFinder(num_steps=100)], logger=False, enable_checkpointing=False)
    """

    result: LRRange | None = None
    trials: Sequence[RateTrial] = ()
    _seconds = 0.0  # that the trials took

    def __init__(
        self,
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        num_steps: int = 100,
        suggestion: Literal["middle", "steepest", "valley", "minimum", "trained"] = "middle",
        *,
        trial_steps: int | None = None,
        apply: bool = True,
        verbose: bool = True,
    ) -> None:
        owner = type(self).__name__
        self.min_lr = check_in(owner, "min_lr", min_lr, "(0, inf)")
        self.max_lr = check_in(owner, "max_lr", max_lr, "(0, inf)")
        if self.max_lr <= self.min_lr:
            raise ValueError(f"{owner}(max_lr={max_lr!r}): max_lr must be above min_lr, which is {min_lr!r}.")
        self.num_steps = check_int(owner, "num_steps", num_steps, minimum=20)
        check_one_of(owner, "suggestion", suggestion, (*RULES, TRAINED))
        if trial_steps is not None and suggestion != TRAINED:
            raise ValueError(f"{owner}(trial_steps={trial_steps!r}): trial_steps is for suggestion='{TRAINED}' only.")
        self.trial_steps = check_int(owner, "trial_steps", 200 if trial_steps is None else trial_steps, minimum=40)
        check_bools(owner, apply=apply, verbose=verbose)
        self.suggestion, self.apply, self.verbose = suggestion, apply, verbose

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        owner = type(self).__name__
        refuse_twice(self, trainer)
        refuse_split_parameters(self, trainer)
        if not pl_module.automatic_optimization:
            raise ValueError(f"{owner}(): needs automatic optimization; a module that steps by itself sets its rates.")
        self.trials = ()
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
        bases = bases_of(trainer)
        if max(bases, default=0.0) <= 0:
            raise ValueError(f"{owner}(): at least one parameter group must have a rate above 0, for the ratios.")
        ratios = [base / max(bases) for base in bases]
        if self.verbose:
            rank_zero_info(self._about_to_do())
        trial_fit = TrialFits(trainer)
        self.result = self._tested(trainer, trial_fit, ratios)
        if self.suggestion == TRAINED and not self.result.reason:
            self.result = self._trained(trainer, trial_fit, ratios, self.result)
        chosen = self.result.suggestions.get(self.suggestion)
        if self.apply and chosen is not None:
            set_rates(trainer, chosen, max(bases))
        if self.verbose:
            begins = max(float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
            rank_zero_info(self._text(self.result, max(bases), begins))
        if (self.apply or self.verbose) and stands_alone(self.result.suggestions, self.suggestion):
            rank_zero_warn(
                f"{owner}: the rules are far apart, and {self.suggestion} is more than 10 times from the others; "
                f'{owner}(suggestion="{TRAINED}") decides between them.'
            )

    def _tested(self, trainer: pl.Trainer, trial_fit: TrialFits, ratios: list[float]) -> LRRange:
        """The range test."""
        sweep = StepsAtRates(ratios, self._rates())
        if not trial_fit(sweep, self.num_steps):
            rank_zero_warn(
                f"{type(self).__name__}(num_steps={self.num_steps}): the test ended after {len(sweep.losses)} steps "
                "with an epoch without a batch; data that can be read only once are used up, so find the rate in a run "
                "of its own."
            )
        losses = trainer.strategy.broadcast(sweep.losses)  # all processes must choose the same rate
        reason = sweep.reason or ("" if losses else _NO_LOSS)
        if losses and not math.isfinite(losses[0]):
            reason = _NOT_FINITE
        return _nothing(reason) if reason else lr_range(self._rates()[: len(losses)], losses)

    def _trained(self, trainer: pl.Trainer, trial_fit: TrialFits, ratios: list[float], found: LRRange) -> LRRange:
        """The result with the rate that trains best."""

        def train(rate: float, steps: int) -> RateTrial:
            watcher = StepsAtRates(ratios, [rate] * steps)
            trial_fit(watcher, steps)
            losses = trainer.strategy.broadcast(watcher.losses)
            return RateTrial(rate, len(losses), loss_of(losses, steps))

        begin = time.perf_counter()
        self.trials = trials_of(ladder(found.suggestions), self.trial_steps, train)
        self._seconds = time.perf_counter() - begin
        best = best_of(self.trials)
        reason = _NONE_TRAINED if best is None else ""
        return replace(found, suggestions={**found.suggestions, TRAINED: best}, reason=reason)

    def _rates(self) -> list[float]:
        low, high = math.log(self.min_lr), math.log(self.max_lr)  # whose ratio may be more than a number can hold
        rates = [math.exp(low + (high - low) * step / (self.num_steps - 1)) for step in range(self.num_steps)]
        return [self.min_lr, *rates[1:-1], self.max_lr]

    def _about_to_do(self) -> str:
        """Before a wait in which nothing else is shown."""
        more = (
            f", then trains at some 10 rates for some {6 * self.trial_steps:,} steps"
            if self.suggestion == TRAINED
            else ""
        )
        return (
            f"{type(self).__name__} tests {self.num_steps} rates from {self.min_lr:.3g} to {self.max_lr:.3g}, a step "
            f"each{more}."
        )

    def _text(self, result: LRRange, before: float, begins: float) -> str:
        owner = type(self).__name__
        if result.reason:
            return f"{owner}: no suggestion, the rate stays {before:.3g}: {result.reason}."
        found = ", ".join(f"{name} {lr:.3g}" for name, lr in result.suggestions.items() if lr is not None)
        chosen = result.suggestions[self.suggestion]
        does = f"the rate is now {chosen:.3g} ({self.suggestion})" if self.apply else f"the rate stays {before:.3g}"
        said = f"{owner}: {found}; {does}, {before:.3g} before"
        base = chosen if self.apply and chosen is not None else before
        is_warmed_up = not math.isclose(begins, base, rel_tol=1e-5)
        said += f"; the schedule of the module begins at {begins:.3g}. " if is_warmed_up else ". "
        said += f"Tested {len(result.lrs)} rates up to {result.lrs[-1]:.3g}."
        if self.trials:
            rates, steps = {trial.lr for trial in self.trials}, sum(trial.steps for trial in self.trials)
            said += (
                f" Trained at {len(rates)} rates from {min(rates):.3g} to {max(rates):.3g}, {steps:,} steps in all, in "
                f"{self._seconds:.3g} s."
            )
        return said


def _nothing(reason: str) -> LRRange:
    """A result without suggestions."""
    return LRRange((), (), (), dict.fromkeys(RULES), reason)
