# SPDX-License-Identifier: Apache-2.0
"""Checks of a module and its data before a run: what a few steps on one batch tell, in under a minute.

A copy of the module is fitted to the first batch with `GradientHealth` beside it, whose rules are those here.
What it says of that fit is a fault. What it would say had nothing been learned (the scale of inputs, targets and
weights) is a hint: the batch was fitted in spite of it. So is a loss that begins far above that of a constant.
"""

import copy
import json
import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl

from lightning_optkit._checks import check_in, check_int
from lightning_optkit.callbacks import GradientHealth
from lightning_optkit.callbacks.seams.schedules_of_run import base_rate
from lightning_optkit.cli.high_start import high_start
from lightning_optkit.cli.one_batch import one_batch
from lightning_optkit.cli.other_batch import OtherBatch
from lightning_optkit.diagnostics._guard import Guard
from lightning_optkit.diagnostics._observations import Losses, RunSeen
from lightning_optkit.diagnostics.rules import OF_LEARNING, asked
from lightning_optkit.diagnostics.rules.gradients import ATTACHED
from lightning_optkit.diagnostics.rules.outcome import constant_of, outcome_of
from lightning_optkit.diagnostics.rules.rates import lr_too_high, lr_too_low
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["Examination", "Finding", "doctor", "examine"]

_FITTED, _NOT_FITTED = 0.95, 0.5  # progress: above all bounds of the rules; below which they call it learning badly
_EVERY, _LEAST_STEPS = 8, 32  # the rules for gradients that do not arrive need 20 steps
_FIRST_CHECKS = 4
_BATCHES_WITHOUT_STEP = 1000  # a module that steps by itself may add gradients over an epoch
_NOT_HERE = {  # of other data than the one batch, schedules and averages, all left out
    "duplicate_data", "class_imbalance", "overfitting", "schedule_fault", "average_not_ready",
}  # fmt: skip
_SAYS = {
    "shuffled_or_weak": "label_shuffle",
    "constant_input": "input_ignored",
    "high_start": "bad_init_scale",
}  # rules with another name
_HINTS = {"lr_too_low"}  # a rate that is too low for a short fit may be right for a long one
_THAW = "requires_grad_(True) of what is to be trained, before configure_optimizers"
_LIMITS: dict[str, Any] = dict(
    max_epochs=-1, min_steps=None, min_epochs=None, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0, accumulate_grad_batches=1, devices=1,
    num_nodes=1, strategy="auto", overfit_batches=0, fast_dev_run=False, profiler=None, limit_train_batches=1.0,
)  # fmt: skip
_START = "loss at the start"
_CHECKS: dict[str, tuple[str, ...]] = {
    "parameters": ("not_optimized", "no_gradient", "gradient_not_zeroed", "lost_updates", "symmetric_init"),
    "modes": ("wrong_mode",),
    "input": ("unnormalized_input", "input_ignored"),
    "target": ("unscaled_target",),
    _START: ("loss_does_not_match_output", "bad_init_scale", "nonfinite"),
    "gradient over depth": ("vanishing_gradient", "exploding_gradient"),
    "units": ("dead_units", "saturated_units"),
    "one batch": ("lr_too_high", "lr_too_low", "label_shuffle"),
}
_EXPLAINS_START = {*_CHECKS["input"], *_CHECKS["target"], *_CHECKS[_START], *_CHECKS["gradient over depth"]}


@dataclass(frozen=True)
class Finding:
    """One check.

    Args:
        check: Its name.
        seen: The numbers, in words.
        state: "ok", "hint" (the batch was fitted in spite of it), "fault", or "unknown" (a rule that failed included).
        verdict: What the rule says; None where another finding has said it.
    """

    check: str
    seen: str
    state: str
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Examination:
    """All checks.

    Args:
        findings: One or more per check, in order.
        steps: Steps on the batch.
        seconds: Time of all.
    """

    findings: tuple[Finding, ...]
    steps: int
    seconds: float

    @property
    def is_healthy(self) -> bool:
        """Whether there is no fault."""
        return all(finding.state != "fault" for finding in self.findings)

    def to_json(self) -> str:
        """All of it as a JSON object."""
        rows = [{**vars(each), "verdict": each.verdict.to_dict() if each.verdict else None} for each in self.findings]
        return json.dumps({"is_healthy": self.is_healthy, "steps": self.steps, "seconds": self.seconds, "checks": rows})


def doctor(
    module: pl.LightningModule,
    train_dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
    *,
    callbacks: Sequence[pl.Callback] = (),
    max_steps: int = 300,
    max_seconds: float = 30.0,
    **trainer_arguments: Any,
) -> Examination:
    """Fits a copy of the module to its first batch, and says what is wrong.

    Args:
        module: The module; not changed.
        train_dataloaders: As in `Trainer.fit`.
        datamodule: As in `Trainer.fit`.
        callbacks: Those without which it cannot be fitted: `Preprocess`, `Initialize`, `ParameterGroups`, `Fuse`.
        max_steps: Steps on the batch, at least 32; it ends earlier once the batch is fitted.
        max_seconds: The same in time, above 0.
        **trainer_arguments: Of the Trainer, such as `precision` and `accelerator`; those that limit or log a run are
            ignored, since this is none.

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> examination = doctor(BoringModel(), max_steps=40, accelerator="cpu")
        >>> examination.is_healthy
        True
    """

    def make(own: Sequence[pl.Callback], **limits: Any) -> pl.Trainer:
        return pl.Trainer(**{**trainer_arguments, **limits, "callbacks": [*copy.deepcopy([*callbacks]), *own]})

    return examine(make, copy.deepcopy(module), train_dataloaders, datamodule, max_steps, max_seconds)


def examine(
    make_trainer: Callable[..., pl.Trainer],
    module: pl.LightningModule,
    train_dataloaders: Any,
    datamodule: pl.LightningDataModule | None,
    max_steps: int,
    max_seconds: float,
) -> Examination:
    """The same with a function that makes a Trainer from our callbacks and from arguments that limit the run.

    The module itself is fitted: the optimizers of a LightningCLI are those of its own module, not of a copy.
    """
    check_int("doctor", "max_steps", max_steps, minimum=_LEAST_STEPS)
    check_in("doctor", "max_seconds", max_seconds, "(0, inf)")
    begin, health = time.perf_counter(), GradientHealth(verbose=False)
    guard = health._guard = Guard("doctor", "do without the doctor: no run depends on it", is_silent=True)
    other = OtherBatch()
    watch = _Watch(health, other)
    trainer = make_trainer(
        [_WithoutSchedules(), health, watch], **_LIMITS, max_steps=max_steps, max_time=timedelta(seconds=max_seconds)
    )
    with warnings.catch_warnings(), one_batch(module, train_dataloaders, datamodule, max_steps, other) as data:
        warnings.simplefilter("ignore")
        verdicts = [*_fitted(trainer, module, data), *health.verdicts]
    findings = tuple(_findings(watch.seen, verdicts, other, guard))
    guard.tell()  # behind the fit, whose own warnings are left out
    return Examination(findings, watch.seen.steps, round(time.perf_counter() - begin, 2))


def _fitted(trainer: pl.Trainer, module: pl.LightningModule, data: dict[str, Any]) -> list[Verdict]:
    """Fits the batch; a verdict if the first loss has no gradient, at which torch ends the fit."""
    try:
        trainer.fit(module, **data)
    except RuntimeError as error:
        frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        if "does not require grad" not in str(error) or "training_step" in frames or trainer.global_step:
            raise
        params = [*module.parameters()]
        if params and not any(param.requires_grad for param in params):
            cause, remedy = "every parameter is frozen, so that nothing can be learned", _THAW
            evidence = f"none of {len(params)} parameters requires a gradient"
        else:
            cause = "the loss that training_step returns has no gradient: it was detached, or computed without one"
            evidence, remedy = f"torch ended the backward pass ({str(error).splitlines()[0]})", ATTACHED
        return [Verdict("no_gradient", None, cause, evidence, remedy, 0, 1.0)]
    return []


class _WithoutSchedules(pl.Callback):
    """Each rate as it was given: a warm-up would be all of so short a fit."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            return
        trainer.strategy.lr_scheduler_configs = []
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = base_rate(group)


class _Watch(pl.Callback):
    """Stops once the batch is fitted, or nothing can be seen to train it, and keeps what was seen."""

    def __init__(self, health: GradientHealth, other: OtherBatch) -> None:
        self._health, self._other, self.seen, self._batches = health, other, RunSeen(), 0

    def on_train_batch_end(self, *args: Any) -> None:
        seen, trainer = self._health._seen, args[0]
        self._batches += 1
        if not trainer.global_step and self._batches >= _BATCHES_WITHOUT_STEP:
            trainer.should_stop = True
        if seen.steps == 1 or (seen.steps and seen.steps % _EVERY == 0):
            with self._health._guard("the look at another batch"):
                self._other.look(trainer, args[1], *args[3:5])
        if seen.steps >= _LEAST_STEPS and seen.steps % _EVERY == 0:
            with self._health._guard("the judgement of how much was learned"):
                self._health._losses.fetch()
                trainer.should_stop = trainer.should_stop or outcome_of(seen).progress > _FITTED

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen = self._health._seen


def _findings(seen: RunSeen, verdicts: Sequence[Verdict], other: OtherBatch, guard: Guard) -> Iterator[Finding]:
    said = [verdict for verdict in verdicts if verdict.symptom not in _NOT_HERE]
    faults = [verdict for verdict in said if verdict.symptom not in _HINTS]
    is_empty = not math.isnan(other.loss_beside_0)  # the batch: a mask leaves nothing of it, say, but of another
    faults = [verdict for verdict in faults if not (is_empty and verdict.symptom == "no_gradient")]
    # A rate that is too low is what anything else that stops learning looks like.
    hints = [] if faults else [verdict for verdict in said if verdict.symptom in _HINTS]
    if (ignores := other.verdict()) is not None and not faults:
        (faults if other.is_sure else hints).append(ignores)
    at_start, named = _at_the_start(seen, guard), {verdict.symptom for verdict in faults}
    hints += [verdict for verdict in at_start if verdict.symptom not in named]
    high: Verdict | None = None
    with guard("the rule high_start"):
        high = high_start(seen)
    is_explained = any(verdict.symptom in _EXPLAINS_START for verdict in [*faults, *hints])
    of_other = {symptom for symptoms in _CHECKS.values() for symptom in symptoms}
    names = {**_CHECKS, "others": tuple({verdict.symptom for verdict in faults} - of_other)}
    progress = math.nan
    with guard("the judgement of how much was learned"):
        progress = outcome_of(seen).progress
    failed = {_SAYS.get(rule, rule) for part in guard.failed if (rule := part.removeprefix("the rule ")) != part}
    for check, symptoms in names.items():
        words = _words(check, seen, guard)
        found = [Finding(check, words, "fault", verdict) for verdict in faults if _belongs(verdict, check, symptoms)]
        found += [Finding(check, words, "hint", verdict) for verdict in hints if _belongs(verdict, check, symptoms)]
        if check == _START and high and not found:
            found = [Finding(check, words, "hint", None if is_explained else high)]
        if check == "parameters" and not seen.steps and not found:
            found = [Finding(check, words, "fault")]
        elif check == "one batch" and seen.steps < _LEAST_STEPS and not found:
            found = [Finding(check, f"{words}, too few to tell", "unknown")] if words != _UNKNOWN else []
        elif check == "one batch" and is_empty and not found:
            found = [Finding(check, f"{words}; that of the next batch is {other.loss_beside_0:.3g}", "unknown")]
        elif check == "one batch" and progress < _NOT_FITTED and not faults:
            found = [Finding(check, words, "fault", found[0].verdict if found else None)]
        yield from found
        has_failed = bool(failed & set(symptoms))
        if not found and (words or has_failed):
            is_unknown = has_failed or words == _UNKNOWN or (check == "one batch" and math.isnan(progress))
            yield Finding(check, words or _UNKNOWN, "unknown" if is_unknown else "ok")


def _belongs(verdict: Verdict, check: str, symptoms: Sequence[str]) -> bool:
    if verdict.symptom == "nonfinite" and verdict.onset_step:  # the start was finite
        return check == "one batch"
    return verdict.symptom in symptoms


def _words(check: str, seen: RunSeen, guard: Guard) -> str:
    with guard(f"the summary of {check}"):
        return _WORDS[check](seen) if check in _WORDS else ""
    return _UNKNOWN


def _at_the_start(seen: RunSeen, guard: Guard) -> list[Verdict]:
    """What would be said had the run ended after its first steps, without having learned."""
    first = seen.losses.first[:_FIRST_CHECKS]
    start = replace(
        seen, checks=seen.checks[:_FIRST_CHECKS], is_over=True, nonfinite=None, validations=[],
        losses=Losses(first, copy.copy(Losses().recent), len(first)),
    )  # fmt: skip
    start.losses.recent.extend(first)
    return asked([rule for rule in OF_LEARNING if rule not in (lr_too_high, lr_too_low)], start, guard)


# --- the numbers of each check, in words ---

_UNKNOWN = "not known"


def _parameters(seen: RunSeen) -> str:
    if not seen.checks:
        return _UNKNOWN if seen.steps else "no step was taken"
    params = seen.checks[-1].parameters
    inside = [p for p in params if p.is_optimized]
    return f"{len(inside)} of {len(params)} in an optimizer, {sum(p.numel for p in inside):,} numbers"


def _modes(seen: RunSeen) -> str:
    called = [m for m in seen.checks[-1].modules if m.acts] if seen.checks else []
    off = sum(not m.is_training for m in called)
    return f"{off} of {len(called)} dropouts and batch norms in eval mode" if called else ""


def _input(seen: RunSeen) -> str:
    first = seen.checks[0].first_input if seen.checks else None
    if first is None:
        return ""
    return f"root mean square {first.rms:.3g}, deviations of features vary {first.spread:.3g} times, at {first.layer}"


def _target(seen: RunSeen) -> str:
    losses = seen.checks[0].losses if seen.checks else ()
    if len(losses) != 1 or math.isnan(losses[0].target_mean):
        return ""
    return f"mean {losses[0].target_mean:.3g}, deviation {losses[0].target_std:.3g}"


def _loss(seen: RunSeen) -> str:
    if not seen.losses.first:
        return _UNKNOWN
    constant = constant_of(seen)
    against = "" if math.isnan(constant) else f", where a constant prediction has {constant:.3g}"
    return f"{seen.losses.first[0]:.3g}{against}"


def _depth(seen: RunSeen) -> str:
    layers = [layer for layer in seen.checks[0].layers if layer.grad_rms > 0] if seen.checks else []
    if len(layers) < 2:
        return ""
    ratio = layers[0].grad_rms / layers[-1].grad_rms
    return f"at {layers[0].name} {ratio:.2g} times that at {layers[-1].name}"


def _units(seen: RunSeen) -> str:
    activations = seen.checks[0].activations if seen.checks else ()
    if not activations:
        return ""
    worst = max(activations, key=lambda each: each.closed)
    return f"at most {worst.closed:.0%} closed, of the {worst.function} in {worst.layer or 'training_step'}"


def _one(seen: RunSeen) -> str:
    if not seen.losses.num:
        return _UNKNOWN
    last = seen.losses.last(4)
    return f"loss {seen.losses.first[0]:.3g} to {sum(last) / len(last):.3g} in {seen.steps} steps"


_WORDS: dict[str, Callable[[RunSeen], str]] = {
    "parameters": _parameters, "modes": _modes, "input": _input, "target": _target, _START: _loss,
    "gradient over depth": _depth, "units": _units, "one batch": _one,
}  # fmt: skip
