# SPDX-License-Identifier: Apache-2.0
"""Optuna: a study whose trials are pruned by their validation loss, each with a fresh module and Trainer."""

from typing import Any

import optuna
from _client import Run, fits
from around_the_module import classifier
from optuna.integration import PyTorchLightningPruningCallback

RATES = (0.05, 0.03, 1e-6, 1e-7)
PRUNED: list[int] = []
"""Numbers of the trials that were pruned in the last study."""


def pruned(variant: str, steps: int) -> Run:
    """Four trials; the run is the first. Rates that are far too small are stopped."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    runs: list[Run] = []

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("lr", 1e-8, 1.0, log=True)

        def make() -> tuple[Any, dict[str, Any]]:
            module, data = classifier()
            configure = module.configure_optimizers

            def with_rate() -> Any:
                configured = configure()
                configured["optimizer"].param_groups[0]["lr"] = rate
                return configured

            module.configure_optimizers = with_rate
            return module, data

        seen: list[Any] = []

        def callbacks() -> list[Any]:
            seen.append(PyTorchLightningPruningCallback(trial, monitor="val_loss"))
            return seen

        runs.append(fits(make, callbacks=callbacks)(variant, steps))
        seen[0].check_pruned()
        return runs[-1].losses[-1]

    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=2))
    for rate in RATES:
        study.enqueue_trial({"lr": rate})
    study.optimize(objective, n_trials=len(RATES))
    PRUNED[:] = [trial.number for trial in study.trials if trial.state == optuna.trial.TrialState.PRUNED]
    return runs[0]


CLIENTS = {"Optuna: PyTorchLightningPruningCallback": pruned}
