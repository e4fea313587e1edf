# SPDX-License-Identifier: Apache-2.0
"""Ends a trial of a search over settings when `GradientHealth` says that it cannot become a good one.

Source: Liang et al. 2026, "BTTackler", arXiv:2602.23630, which ends trials of a search by diagnosis of their training;
the findings and their thresholds are those of `GradientHealth`. Optuna's own pruners compare a trial with those before
it, so the first ones run in full; a finding needs no comparison, and says what to leave out of the search.
"""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_optkit._checks import check_in, check_like, check_listed, check_one_of
from lightning_optkit.callbacks.gradient_health import GradientHealth
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of, insert_callback
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.refusals import refuse_listed_twice
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.diagnostics.rules import OF_LEARNING
from lightning_optkit.diagnostics.rules.classes import class_imbalance
from lightning_optkit.diagnostics.rules.scales import unnormalized_input, unscaled_target
from lightning_optkit.diagnostics.verdict import SYMPTOMS, Verdict

__all__ = ["PruneTrial"]

# Named only if a run learns badly, or not at all. The others are faults of the program, which all trials share, as they
# do their data: inputs and targets out of scale, rare classes, which a better setting finds later, and inputs that say
# little or nothing about the targets. There a trial that has learned next to nothing may be the best.
_OF_DATA = (unnormalized_input, unscaled_target, class_imbalance)
_OF_SETTINGS = (*(rule.__name__ for rule in OF_LEARNING if rule not in _OF_DATA), "nonfinite")
_FIRST, _EVERY = 48, 1 / 20  # judged from so many steps on, and at every such part of the run
_COMING = 0.7  # calibrated: a trial that is missing less than this part of what it was missing a look ago is let be
_LENGTH = 400  # steps from which on a run is judged whose length is not known


class Trial(Protocol):
    """What is used of an `optuna.Trial`."""

    def set_user_attr(self, key: str, value: Any) -> None:
        """Keeps a value with the trial."""


class PruneTrial(FitCallback):
    """Raises `optuna.TrialPruned` if `GradientHealth` names a reason why the run learns next to nothing.

    A trial ends if both hold: the primary verdict is one of `symptoms`, and the loss has come less than `progress` of
    the way from that of the best constant prediction to 0. It is judged from `after` on at every twentieth of the run,
    as `GradientHealth` judges a run at its half; if the loss itself is not finite, at once. One that is coming there,
    as with large initial weights, is let be: that is missing less than seven tenths of what it was a twentieth before.
    So is one whose scheduler has not yet raised the rate to half of its peak, and one of which few batches have a large
    loss, as with heavy-tailed targets: the median of the last losses counts as well as their mean.

    `lr_too_low` condemns only where outputs told at least `progress` of a direction of the targets before these were
    trained on: where inputs say little, none is better. Without a `GradientHealth` among the callbacks, a silent one is
    added for the fit. The verdict is kept in `trial.user_attrs["verdict"]`.

    Args:
        trial: The `optuna.Trial` of the objective.
        after: Share of the run after which it is judged, in (0, 1); a run whose length is not known is judged after 400
            steps.
        progress: A trial that has come so far is let be, in (0, 1].
        symptoms: Symptoms that condemn a trial, of `lightning_optkit.diagnostics.SYMPTOMS`. Default: those of settings
            and initial weights, and `nonfinite`; a fault of the program would end all trials alike, and so would data
            that are not scaled, or mean nothing. Give these as well where a search is over how data are prepared.

    Raises:
        TypeError: if `trial` is no trial, or `symptoms` no list.
        ModuleNotFoundError: without optuna.
        ValueError: for an argument out of range or an unknown symptom; when the fit starts, in several processes.

    Cost: that of `GradientHealth`.

    Example:
        >>> import optuna
        >>> trial = optuna.trial.FixedTrial({"lr": 0.1})
        >>> trainer = pl.Trainer(callbacks=[PruneTrial(trial)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self, trial: Trial, after: float = 0.2, progress: float = 0.1, symptoms: Sequence[str] = _OF_SETTINGS
    ) -> None:
        owner = type(self).__name__
        if find_spec("optuna") is None:
            raise ModuleNotFoundError(
                f"{owner} needs optuna: pip install optuna, which is also in the extra `search` of this package.",
                name="optuna",
            )
        check_like(owner, "trial", trial, ("set_user_attr",), "an optuna.Trial")
        self.trial = trial
        self.after = check_in(owner, "after", after, "(0, 1)")
        self.progress = check_in(owner, "progress", progress, "(0, 1]")
        self.symptoms = tuple(check_listed(owner, "symptoms", symptoms, 'a list such as ["nonfinite"]'))
        for symptom in self.symptoms:
            check_one_of(owner, "symptoms", symptom, SYMPTOMS)
        self._forget()

    def _forget(self) -> None:
        self._judged_at, self._asked_next = 0, 0.0  # steps
        self._healths: list[GradientHealth] = []
        self._missing: dict[GradientHealth, float] = {}  # of `progress`, at the look before
        self._is_unknown: bool | None = None  # whether it was never known how much the run has learned

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_listed_twice(self, trainer)
        if trainer.world_size > 1:
            raise ValueError(
                f"{type(self).__name__}(...): a trial in {trainer.world_size} processes would end in one of them only; "
                "give each trial one process."
            )
        self._forget()
        if not callbacks_of(trainer, GradientHealth):
            health = GradientHealth(verbose=False)
            health.probe_below(self.progress)  # no other run is condemned
            self._at_end(insert_callback(trainer, health, behind=self))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_due = self._is_due(trainer)
        if is_due or not self._healths:
            self._healths = callbacks_of(trainer, GradientHealth)
        for health in self._healths:
            if health.verdicts and health.verdicts[0].symptom == "nonfinite" and _is_lost(outputs):
                self._condemn(trainer, health.verdicts[0])
            if is_due:
                verdicts, outcome = health.judge_now(below=self.progress)
                self._is_unknown = math.isnan(outcome.progress) and self._is_unknown is not False
                is_coming = self._is_coming(health, outcome.progress)
                if is_coming or Run(trainer).step < self._judged_from(Run(trainer)):
                    continue
                if verdicts and self._can_do_better(health, verdicts[0]):
                    self._condemn(trainer, verdicts[0])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_unknown:
            rank_zero_warn(
                f"{type(self).__name__}(...): the trial was not judged, since it is not known how much it has learned; "
                "that takes one loss per step, of a loss function of torch. A pruner of Optuna needs no such loss."
            )

    # --- implementation ---

    def _is_due(self, trainer: pl.Trainer) -> bool:
        run = Run(trainer)
        step = run.step
        if step < self._asked_next:
            return False
        every = _EVERY * (run.steps_at_end() or _LENGTH)
        # The first look has nothing to compare with, and ends no trial.
        due = max(self._judged_from(run) - every, self._judged_at + every)
        self._asked_next = min(due, step + every)  # the plan may change until then
        if step < due:
            return False
        self._judged_at = step
        return True

    def _judged_from(self, run: Run) -> float:
        planned = run.steps_at_end()
        return _LENGTH if planned is None else max(_FIRST, self.after * planned)

    def _is_coming(self, health: GradientHealth, progress: float) -> bool:
        """Whether much less is missing than at the look before."""
        missing = self.progress - progress
        before, self._missing[health] = self._missing.get(health, math.nan), missing
        return missing < _COMING * before

    def _can_do_better(self, health: GradientHealth, verdict: Verdict) -> bool:
        return verdict.symptom != "lr_too_low" or health.told() >= self.progress  # NaN: not known

    def _condemn(self, trainer: pl.Trainer, verdict: Verdict) -> None:
        if verdict.symptom not in self.symptoms:
            return
        from optuna import TrialPruned

        self.trial.set_user_attr("verdict", str(verdict))
        raise TrialPruned(f"{type(self).__name__}: after {Run(trainer).step} steps, {verdict}")


def _is_lost(outputs: Any) -> bool:
    """Whether the loss of the batch is not finite."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return isinstance(loss, Tensor) and not math.isfinite(float(loss.detach()))
