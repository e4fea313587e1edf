# SPDX-License-Identifier: Apache-2.0
"""LRFinder(suggestion="trained"): short trainings at rates around the suggestions decide."""

import numpy as np
import pytest
from lr_finder_cases import STRATEGIES, Net, Once, data, fit, same, trained, with_own_generator
from torch.utils.data import DataLoader


@pytest.mark.parametrize("name", STRATEGIES)
def test_trained_beside_other_strategies(name):
    found = trained(max_lr=1.0)
    module, plain = Net(), Net()
    fit(module, *STRATEGIES[name](), found)
    plain.lr = found.result.suggestions["trained"]
    fit(plain, *STRATEGIES[name]())
    assert same(module, plain) and found.trials


@pytest.mark.parametrize("arguments", [dict(accumulate_grad_batches=3), dict(loader=with_own_generator)])
def test_trained_in_other_runs(arguments):
    made = dict(arguments)
    make = made.pop("loader", data)
    fit(module := Net(), found := trained(), loader=make(), **made)
    fit(plain := Net(found.result.suggestions["trained"]), loader=make(), **made)
    assert same(module, plain)


def test_each_training_is_that_of_a_run_at_its_rate():
    class Keeps(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses = [*getattr(self, "losses", []), float(loss.detach())]
            return loss

    fit(Net(), found := trained())
    assert {trial.steps for trial in found.trials} == {10, 20, 40}
    for trial in found.trials[::3]:
        fit(module := Keeps(trial.lr), max_epochs=-1, max_steps=trial.steps)
        assert trial.loss == pytest.approx(np.mean(module.losses[-(trial.steps // 4) :]))
    longest = [trial for trial in found.trials if trial.steps == 40]
    assert found.result.suggestions["trained"] == min(longest, key=lambda trial: trial.loss).lr


def test_trained_says_what_it_cost(printed):
    found = trained(verbose=True)
    fit(Net(), found)
    steps = sum(trial.steps for trial in found.trials)
    rates = [trial.lr for trial in found.trials]
    before, said = dict.fromkeys(line for line in printed().splitlines() if line.startswith("LRFinder"))
    does = "LRFinder tests 60 rates from 1e-05 to 10, a step each"
    assert before == f"{does}, then trains at some 10 rates for some 240 steps."
    assert f"the rate is now {found.result.suggestions['trained']:.3g} (trained)" in said
    assert f"rates from {min(rates):.3g} to {max(rates):.3g}, {steps} steps in all, in " in said


def test_trained_without_a_training_that_ends_keeps_the_rate(printed):
    steps = []

    class Late(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            steps.append(float(loss.detach()))  # not an attribute, which would return to what it was
            return loss * float("nan") if len(steps) > 60 else loss

    trainer = fit(Late(), found := trained(verbose=True), max_steps=1)
    assert "LRFinder: no suggestion, the rate stays 0.05: the loss diverged, or the data ended, in the" in printed()
    assert found.result.suggestions["trained"] is None and len(found.trials) <= 10
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05


def test_trained_on_data_that_can_be_read_once_has_a_reason():
    with pytest.warns(UserWarning, match=r"^LRFinder\(num_steps=60\): the test ended after 8 steps .* used up"):
        fit(Net(), found := trained(), loader=DataLoader(Once(), batch_size=32))
    assert found.result.reason and not any(trial.steps for trial in found.trials)


def test_without_a_range_nothing_is_trained():
    fit(Net(), found := trained(max_lr=1e-4))
    assert found.result.reason.startswith("the loss does not fall") and found.trials == ()
