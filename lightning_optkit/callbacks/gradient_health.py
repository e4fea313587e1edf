# SPDX-License-Identifier: Apache-2.0
"""Says what is wrong with a run, where, why, and the line that mends it.

What is seen and what is concluded are apart: `seams` and `diagnostics.measure` see, `diagnostics.rules` conclude, from
plain numbers. docs/diagnosis.md says what each verdict rests on, how often it was right on runs that were broken on
purpose, and what cannot be seen.
"""

import json
import math
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit._checks import check_bools, check_int, check_state
from lightning_optkit.callbacks.seams.associations_of_run import AssociationsOfRun
from lightning_optkit.callbacks.seams.average_of_run import averages_too_long
from lightning_optkit.callbacks.seams.compared import Compared
from lightning_optkit.callbacks.seams.first_nonfinite import first_nonfinite
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.idle_batches import IdleBatches
from lightning_optkit.callbacks.seams.lightning_packages import loss_scaler
from lightning_optkit.callbacks.seams.losses_of_run import LossesOfRun
from lightning_optkit.callbacks.seams.measured_steps import MeasuredSteps
from lightning_optkit.callbacks.seams.presence import Presence
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.schedules_of_run import SchedulesOfRun
from lightning_optkit.callbacks.seams.steps import StepListener, watch_steps
from lightning_optkit.callbacks.seams.vain_steps import VainSteps
from lightning_optkit.callbacks.seams.validated_targets import ValidatedTargets
from lightning_optkit.callbacks.seams.zeroing import Zeroing
from lightning_optkit.diagnostics._guard import Guard
from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.rules import diagnose, is_exact, ranked
from lightning_optkit.diagnostics.rules.outcome import Outcome, outcome_of, typical_progress
from lightning_optkit.diagnostics.verdict import Verdict, verdict_from

__all__ = ["GradientHealth"]

_PRESENCE = 32  # in so many steps it is looked at every one for parameters without a gradient, then at measured ones
_PROBED_BELOW = 0.5  # progress
_FIRST_EPOCHS = 3  # a scheduler that is never stepped is known after two


class GradientHealth(FitCallback):
    """Watches a fit and names what is wrong with it: `verdicts`, the primary one first, during and after the fit.

    It changes nothing. A few steps at the start, and every `check_every`-th, are measured: which modules are called, in
    which mode and with what, norms of gradients, weights and updates. In between it counts: losses, rates, gradients
    that do not arrive or are not cleared. A one-pass optimizer (`Fuse`) measures in its own pass; for any other, up to
    4,096 elements of each parameter are copied before a measured step. An error of its own does not end the fit: it is
    a warning once, and what failed is left out.

    Mechanical faults are named whatever the run learns: `no_gradient`, `not_optimized`, `gradient_not_zeroed`,
    `nonfinite`, `symmetric_init`, `wrong_mode`, `schedule_fault`, `lost_updates`, `loss_does_not_match_output`,
    `average_not_ready`, and in several processes `ranks_diverge` and `duplicate_data`.

    Faults of settings, data and initial weights are named only if the run learns badly, judged by its loss against that
    of the best constant prediction: `unnormalized_input`, `unscaled_target`, `bad_init_scale`, `saturated_units`,
    `dead_units`, `vanishing_gradient`, `exploding_gradient`, `loss_spike`, `lr_too_high`, `lr_too_low`,
    `class_imbalance`, `overfitting`, `input_ignored`, `label_shuffle`. For these, a run that has not learned much in
    its first quarter is measured at every twentieth of the rest, and the loss of its batch is evaluated along the
    update. They need a loss function of torch, one per step, and are judged from the middle of the run on.
    `class_imbalance` is judged by the predictions in measured steps, of which there are up to 40 more if one class has
    over four fifths of the samples; `overfitting` by the validation loss, if one value is logged with "val" and "loss"
    in its name.

    Args:
        check_every: Optimizer steps between measured ones, at least 1.
        verbose: Warn of each new primary verdict.
        probe: Run `training_step` again on a batch to see where its update leads. What it changes outside of the
            module, the batch and the Trainer, or within an iterator or a large array that it keeps, is changed once
            more; without probes `lr_too_low`, `input_ignored`, `label_shuffle` and part of `lr_too_high` are not named.

    Raises:
        ValueError: for an argument out of range.

    Cost: a measured step reads weights and gradients once more, and a small reduction per parameter is fetched; one
    with a probe runs `training_step` eight more times, and copies the weights twice. In the others, nothing is read
    from a device.

    Example:
        >>> health = GradientHealth()
        >>> trainer = pl.Trainer(callbacks=[health], logger=False, enable_checkpointing=False)
        >>> health.verdicts
        []
    """

    def __init__(self, check_every: int = 200, verbose: bool = True, probe: bool = True) -> None:
        self.check_every = check_int(type(self).__name__, "check_every", check_every, minimum=1)
        check_bools(type(self).__name__, verbose=verbose, probe=probe)
        self.verbose, self.probe = verbose, probe
        self.verdicts: list[Verdict] = []
        self._probed_below = _PROBED_BELOW
        self._guard = Guard(type(self).__name__, f"leave {type(self).__name__} out of the callbacks")
        self._forget()

    def _forget(self) -> None:
        self._seen, self._losses = RunSeen(), LossesOfRun()
        self._zeroing, self._presence, self._idle = Zeroing(), Presence(), IdleBatches()
        self._schedules: SchedulesOfRun | None = None
        self._vain: VainSteps | None = None
        below = self._probed_below if self.probe else 0.0
        self._steps = MeasuredSteps(self._seen, self._losses, self.check_every, below, self._guard)
        self._batch: tuple[Any, int] | None = None
        self._has_stepped = self._has_backward = False  # in this batch
        self._is_open = False  # whether something is watched within this batch
        self._is_said = self._has_arrived = False  # that a gradient does not arrive; one of those that did not
        self._compared = Compared(self._guard)
        self._has_validated = False
        self._targets: ValidatedTargets | None = None
        self._associations = AssociationsOfRun(self._guard)

    def to_json(self) -> str:
        """The verdicts as a JSON list of objects, the primary one first."""
        return json.dumps([verdict.to_dict() for verdict in self.verdicts])

    def judge_now(self, below: float) -> tuple[list[Verdict], Outcome]:
        """Verdicts and outcome of the steps so far, as if the run were at its half, from which on it is judged.

        A run has none before it has had half of the rate that its scheduler raises it to, unless it diverges.

        Args:
            below: Progress of a run from which on it has no verdicts, as one whose progress is unknown.
        """
        with self._guard("the judgement before the end"):
            self._losses.fetch()
            seen = replace(self._seen, losses=self._losses.losses, steps_planned=2 * self._seen.steps)
            outcome = outcome_of(seen)
            is_below = outcome.progress < below and typical_progress(seen) < below
            if self._schedules is not None and self._schedules.is_warming_up():
                is_below &= outcome.has_diverged
            is_lost = seen.nonfinite is not None and outcome.has_diverged
            return diagnose(seen, self._guard) if is_below or is_lost else [], outcome
        return [], Outcome(math.nan, False, False)

    def told(self) -> float:
        """How well outputs tell a direction of the targets of the first epoch, before these were trained on.

        The largest squared canonical correlation, in [0, 1], less what chance makes. What outputs of any network tell,
        another network can learn. NaN if it is not known, or not yet.
        """
        dependence = self._seen.fresh.dependence if self._seen.fresh is not None else None
        return math.nan if dependence is None else dependence.largest

    def probe_below(self, progress: float) -> None:
        """From the next fit on, probes only a run that has come less far; for a caller to whom no other matters."""
        self._probed_below = progress

    def conclude_early(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Brings `verdicts` up to the last step of a fit that an exception ends.

        Nothing is run or measured, and no other process is asked: this one may be the only one that fails.
        """
        if not self._steps.has_begun:  # the training has not begun, or all of this has been done
            return
        self._guard.mute()  # of a device that has failed: the verdicts remain those of the last check
        with self._guard("the conclusion of a fit that an exception ends"):
            self._conclude(trainer, pl_module, may_run=False)

    def state_dict(self) -> dict[str, Any]:
        """The verdicts so far, in plain types."""
        return {"verdicts": [verdict.to_dict() for verdict in self.verdicts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the verdicts."""
        saved = check_state(type(self).__name__, state_dict, verdicts=list)["verdicts"]
        call = f"{type(self).__name__}.load_state_dict(state_dict['verdicts']"
        self.verdicts = [verdict_from(each, call) for each in saved]

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._guard.begin()
            self._forget()
            self.verdicts = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._at_end(watch_steps(trainer, StepListener(type(self).__name__, counts=self._after_step)).remove)
        self._at_end(self._close)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with self._guard("the look at schedules"):
            self._schedules = SchedulesOfRun(trainer)
        with self._guard("the look at averages"):
            self._seen.averages = averages_too_long(trainer)
        self._steps.begin(pl_module)
        with self._guard("the look at gradients that do not arrive"):
            self._vain = VainSteps(trainer, pl_module)
            self._at_end(self._vain.close)
        with self._guard("the look at the clip"):
            self._seen.clip = _clip_of(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._is_open:
            self._close()
        self._batch = (batch, batch_idx)
        self._has_stepped = self._has_backward = False
        if self._schedules is not None and self._schedules.has_any:
            with self._guard("the look at schedules"):
                self._schedules.before_batch(trainer)
        if not self._associations.is_over:
            self._is_open = True
            with self._guard("the look at fresh batches"):
                self._associations.before_batch(trainer, pl_module, batch_idx)
        if self._seen.steps >= self._steps.next_look or self._steps.modes is not None:
            self._is_open = True
            with self._guard("a measured step"):
                self._steps.before_batch(trainer, pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._zeroing.is_watching:
            with self._guard("the look at gradients that are left"):
                self._zeroing.before_backward()
        self._has_backward = True
        if self._vain is not None:
            self._vain.has_backward = True
        if self._idle.is_counting:
            self._is_open = True
            with self._guard("the look at batches without a step"):
                self._idle.before_backward(pl_module)
        with self._guard("the look for the first number that is not finite"):
            is_finite = not loss.is_cpu or loss.numel() != 1 or math.isfinite(loss.item())
            if not is_finite and loss_scaler(trainer) is None:
                self._find_nonfinite(trainer, pl_module)  # before the step spreads it

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._associations.is_over:
            self._associations.close()
        if self._schedules is not None and self._schedules.has_any:
            with self._guard("the look at schedules"):
                self._schedules.after_batch(trainer)
        with self._guard("the look at losses"):
            self._losses.after_batch(trainer, pl_module, outputs, self._seen.steps)
        if self._idle.is_counting if self._has_stepped else self._has_backward:
            with self._guard("the look at batches without a step"):
                self._idle.after_batch(trainer, pl_module, self._seen.steps, self._has_stepped)
        is_vain = self._vain is not None and self._vain.is_due
        if self._seen.idle is not self._idle.seen or self._has_arrived or is_vain:
            self._seen.idle, self._has_arrived = self._idle.seen, False
            self._conclude(trainer, pl_module)
        if not self._compared.is_over:
            self._compared.batch(trainer, batch, self._seen)
        measured = self._steps.current
        is_measured = measured is not None and measured.is_taken
        if is_measured:
            with self._guard("a measured step"):
                self._steps.take(trainer, pl_module, (batch, batch_idx))
        if self._steps.compares and self._has_stepped:
            self._compared.weights(trainer, pl_module, self._seen)
        if is_measured:
            self._conclude(trainer, pl_module)
        if self._is_open:
            self._close()
        self._batch = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0 and self._seen.fresh is None:  # no validation
            with self._guard("the look at fresh batches"):
                self._seen.fresh, self._seen.held = self._associations.seen()
        is_open = any(verdict.symptom == "schedule_fault" and not is_exact(verdict) for verdict in self.verdicts)
        if trainer.current_epoch < _FIRST_EPOCHS or is_open:  # later ones tell nothing else that a check does not
            self._conclude(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._targets is None:
            with self._guard("the look at the first validation"):
                self._targets = ValidatedTargets(pl_module, self._guard)
                self._at_end(self._targets.close)
                self._associations.before_validation(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._targets is not None and not trainer.sanity_checking and not self._has_validated:
            self._has_validated = True
            self._targets.close()
            self._associations.close()
            with self._guard("the look at the first validation"):
                self._seen.validated = self._targets.seen()
                self._seen.fresh, self._seen.held = self._associations.seen()
        losses = {name: v for name, v in trainer.callback_metrics.items() if "val" in name and "loss" in name}
        if trainer.sanity_checking or len(losses) != 1:
            return
        with self._guard("the look at validation losses"):
            (monitor, loss), trained = next(iter(losses.items())), self._losses.since_last_asked()
            self._seen.monitor, value = monitor, float(loss)
            self._seen.validations.append(value)
            self._seen.trained.append(trained)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen.is_over = True
        self._conclude(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.conclude_early(trainer, pl_module)
        super().on_exception(trainer, pl_module, exception)

    # --- implementation ---

    def _after_step(self, optimizer: Optimizer, place: int) -> None:
        if self._batch is None:  # a trial, in which no callback but its own is called
            return
        self._has_stepped, measured = True, self._steps.current
        if measured is not None or self._zeroing.is_watching:
            with self._guard("the look at gradients that are left"):
                self._zeroing.after_step(optimizer, self._seen.steps, remember=measured is not None)
        if measured is not None or self._seen.steps < _PRESENCE or self._is_said:
            with self._guard("the look at gradients that do not arrive"):
                self._has_arrived |= self._presence.after_step(optimizer) and self._is_said
        if self._schedules is not None:
            with self._guard("the look at schedules"):
                self._schedules.after_step(optimizer)
        if measured is not None:
            with self._guard("a measured step"):
                measured.after_step(optimizer)
        self._seen.steps += place == 0

    def _close(self) -> None:
        self._is_open = False
        self._idle.close()
        self._associations.close()
        self._steps.close()

    def _conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule, may_run: bool = True) -> None:
        """Takes together what was seen, and tells of a new primary verdict."""
        seen = self._seen
        with self._guard("the look at losses"):
            self._losses.fetch()
        seen.losses, seen.not_zeroed = self._losses.losses, self._zeroing.not_zeroed
        if may_run and seen.nonfinite is None and any(loss - loss != 0 for loss in list(seen.losses.recent)[-1:]):
            with self._guard("the look for the first number that is not finite"):
                self._find_nonfinite(trainer, pl_module)
        with self._guard("the look at gradients that do not arrive"):
            called = self._steps.called or set()
            seen.silent = self._presence.silent(pl_module, called, self._steps.without_grad)
            if self._vain is not None:
                seen.silent += self._vain.silent(pl_module, called)
                seen.vain, self._vain.is_due = self._vain.without_backward(), False
        with self._guard("the look at schedules"):
            if self._schedules is not None:
                seen.schedules = self._schedules.seen(trainer)
            seen.steps_planned = Run(trainer).steps_at_end()
            self._steps.plan_anew()
        before = _named(self.verdicts)
        with self._guard("the conclusion"):
            # What is exact stays said: a fault of the first steps may no longer be visible in the last ones.
            self.verdicts = ranked([*filter(_stands, self.verdicts), *diagnose(seen, self._guard)])
            self._is_said = any(verdict.symptom == "no_gradient" for verdict in self.verdicts)
        if self.verbose and self.verdicts and _named(self.verdicts) != before:
            rank_zero_warn(f"{type(self).__name__}: {self.verdicts[0]}")

    def _find_nonfinite(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._seen.nonfinite is None and self._batch is not None:
            batch, batch_idx = self._batch
            self._losses.fetch()
            losses, step = self._losses.losses, self._seen.steps
            self._seen.nonfinite = first_nonfinite(trainer, pl_module, batch, batch_idx, step, losses)


def _clip_of(trainer: pl.Trainer) -> float | None:
    clip = trainer.gradient_clip_val
    return float(clip) if clip and trainer.gradient_clip_algorithm != "value" else None


def _stands(verdict: Verdict) -> bool:
    # A gradient that is missing may arrive later: all that is needed to say it again is kept anyway.
    return is_exact(verdict) and verdict.symptom != "no_gradient"


def _named(verdicts: list[Verdict]) -> tuple[str, str | None] | None:
    """Symptom and place of the primary verdict, whose numbers may still change."""
    return (verdicts[0].symptom, verdicts[0].layer) if verdicts else None
