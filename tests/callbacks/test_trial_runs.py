# SPDX-License-Identifier: Apache-2.0
"""Runs that train little or nothing: `fast_dev_run`, `max_epochs=0` and `max_steps=0` fail for no callback."""

import pytest
import torch
from test_after_a_fit import EACH, OPTIMIZERS, ROWS, SMALL, Classifier, loader

from lightning_optkit.averaging import EMA, SWA
from lightning_optkit.callbacks import BatchSizeSchedule, LRSchedule, SnapshotEnsemble, WeightAveraging
from lightning_optkit.schedules import constant, join, piecewise_constant, sgdr

pytestmark = pytest.mark.filterwarnings("ignore")
TRIALS = {"fast_dev_run": dict(fast_dev_run=True), "no epochs": dict(epochs=0), "no steps": dict(max_steps=0)}
LONG = {
    "a cycle of 50 steps": lambda: SnapshotEnsemble(sgdr(cycle=50)),
    "a cycle that starts at step 50": lambda: SnapshotEnsemble(2, start=50),
    "cycles of a fraction after step 50": lambda: SnapshotEnsemble(0.5, start=50),
    "a schedule of 50 steps": lambda: LRSchedule(join(constant(), 50, constant()), verbose=False),
    "batch sizes of later epochs": lambda: BatchSizeSchedule({0: 4, 1: 5}, verbose=False),
    "a batch size schedule of 5 epochs": lambda: BatchSizeSchedule(piecewise_constant([5], [1.0, 2.0]), verbose=False),
    "an average that starts at step 50": lambda: WeightAveraging(SWA(50)),
    "an average that every 50th step updates": lambda: WeightAveraging(EMA(0.9, every=50)),
}


def fit(make_trainer, callback, name, trial):
    module = Classifier(OPTIMIZERS.get(name, torch.optim.SGD))
    trainer = make_trainer(callback, **{**SMALL, **TRIALS[trial]})
    trainer.fit(module, loader(), loader())
    return trainer


@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize("name", LONG)
def test_what_is_longer_than_a_trial_is_let_be(make_trainer, tmp_path, monkeypatch, name, trial):
    monkeypatch.chdir(tmp_path)
    callback = LONG[name]()
    trainer = fit(make_trainer, callback, name, trial)
    assert trainer.global_step == (1 if trial == "fast_dev_run" else 0)
    if isinstance(callback, SnapshotEnsemble):
        assert callback.paths == []


@pytest.mark.parametrize("trial", TRIALS)
@EACH
def test_every_callback(make_trainer, tmp_path, monkeypatch, name, trial):
    monkeypatch.chdir(tmp_path)
    trainer = fit(make_trainer, ROWS[name](), name, trial)
    assert trainer.global_step == (1 if trial == "fast_dev_run" else 0)


def test_a_run_proper_still_refuses_a_cycle_that_does_not_fit(make_trainer):
    with pytest.raises(ValueError, match="SnapshotEnsemble"):
        make_trainer(SnapshotEnsemble(sgdr(cycle=50)), **SMALL).fit(Classifier(), loader(), loader())
