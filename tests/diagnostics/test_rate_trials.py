# SPDX-License-Identifier: Apache-2.0
"""The rates that are trained, and for how long, on losses whose lowest place is known."""

import itertools
import math

import pytest

from lightning_optkit.diagnostics._rate_trials import RateTrial, best_of, ladder, loss_of, trials_of


def valley(at, diverges=math.inf):
    """A loss that is lowest at the rate `at`, at any length."""

    def train(lr, steps):
        done = steps if lr < diverges else 3
        return RateTrial(lr, done, math.log(lr / at) ** 2 + 1 if done == steps else math.inf)

    return train


def test_the_ladder_surrounds_the_suggestions():
    rates = ladder({"middle": 1e-2, "steepest": 3e-3, "valley": 1e-6, "minimum": None})
    assert rates[0] == pytest.approx(3e-4) and rates[-1] == pytest.approx(0.1)  # the careful one is left out
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([(0.1 / 3e-4) ** (1 / 6)] * 6)
    assert len(ladder({"middle": 1e-9, "steepest": 1.0})) == 10
    assert ladder({"middle": None}) == []


@pytest.mark.parametrize("at", [1.2e-4, 4e-3, 0.09, 0.16])
def test_the_best_is_found_within_a_half_of_a_factor(at):
    rates = ladder({"middle": 1e-2, "steepest": 3e-3})
    trials = trials_of(rates, 100, valley(at))
    assert abs(math.log(best_of(trials) / at)) < 0.6 * math.log(3)
    steps = sum(trial.steps for trial in trials)
    assert {trial.steps for trial in trials} == {25, 50, 100} and steps <= 25 * 10 + 50 * 5 + 100 * 2
    assert [trial.steps for trial in trials] == sorted(trial.steps for trial in trials)
    assert len(trials) == len({(trial.lr, trial.steps) for trial in trials})  # nothing is trained twice


def test_longer_trainings_decide():
    """The largest rate leads at first only."""
    rates = [1e-3, 3e-3, 9e-3]

    def train(lr, steps):
        return RateTrial(lr, steps, -lr if steps < 50 else abs(math.log(lr / 3e-3)))

    assert best_of(trials_of(rates, 100, train)) == pytest.approx(3e-3, rel=0.01)


def test_rates_that_diverge_are_left_behind():
    rates = ladder({"middle": 1e-2})
    trials = trials_of(rates, 100, valley(0.1, diverges=0.05))
    assert best_of(trials) < 0.05 and [t for t in trials if t.lr > 0.05 and t.steps > 3] == []
    lost = trials_of(rates, 100, valley(0.1, diverges=0.0))
    assert len(lost) == len(rates) and best_of(lost) is None
    assert trials_of([], 100, valley(1.0)) == []


def test_the_loss_of_a_training_is_that_of_its_last_quarter():
    assert loss_of([9.0, 9.0, 9.0, 1.0], 4) == 1.0
    assert loss_of([9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 3.0, 1.0], 8) == 2.0
    assert loss_of([1.0, 1.0, 1.0], 4) == math.inf
    assert loss_of([1.0, math.nan, 1.0, 1.0], 4) == math.inf
