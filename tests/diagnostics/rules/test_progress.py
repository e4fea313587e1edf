# SPDX-License-Identifier: Apache-2.0
"""How much of what there is to learn a run has learned."""

import math
from dataclasses import replace

import pytest

from lightning_optkit.diagnostics.rules import diagnose
from lightning_optkit.diagnostics.rules.labels import shuffled_or_weak
from lightning_optkit.diagnostics.rules.last_resorts import input_ignored
from lightning_optkit.diagnostics.rules.outcome import outcome_of
from tests.diagnostics.rules.learning_cases import LOSS, NAN, PROBE, seen


def test_progress_is_that_over_a_constant_prediction():
    assert outcome_of(seen(loss=1.15)).progress == pytest.approx(0.5)
    assert outcome_of(seen(loss=25.0)).has_diverged and not outcome_of(seen(loss=20.0)).has_diverged
    assert outcome_of(seen(steps=49)).is_late is False and outcome_of(seen(steps=50)).is_late
    assert math.isnan(outcome_of(seen(losses=(LOSS, LOSS))).progress)


def test_the_entropy_of_soft_targets_is_not_to_be_learned():
    soft = (replace(LOSS, floor=2.2),)
    assert outcome_of(seen(loss=2.25, losses=soft)).progress == pytest.approx(0.5)
    assert math.isnan(outcome_of(seen(loss=2.3, losses=(replace(LOSS, floor=2.3),))).progress)
    exchanged = replace(PROBE, permuted=2.305)  # 0.2 % of the loss, 5 % of what can be learned
    assert input_ignored(seen(probe=exchanged)) is not None
    assert input_ignored(seen(probe=exchanged, losses=soft)) is None


@pytest.mark.parametrize("times", [1e-6, 0.25, 1.0, 100.0])
def test_progress_of_a_multiple_of_the_loss_of_torch(times):
    run = seen(loss=1.15 * times, returned=LOSS.value * times)
    assert outcome_of(run).progress == pytest.approx(0.5) and not outcome_of(run).has_diverged
    other = seen(probe=replace(PROBE, permuted=2.4), validations=(2.5, 2.6))
    returned = [replace(check, returned=LOSS.value * times) for check in other.checks]
    scaled = replace(other, losses=seen(loss=2.3 * times).losses, checks=returned)
    assert (shuffled_or_weak(scaled) is not None) == (times == 1.0)  # a validation may not be multiplied


def test_a_loss_that_is_that_of_torch_and_something_else_is_not_judged():
    assert math.isnan(outcome_of(seen(loss=52.3, returned=52.4, first=dict(returned=60.0))).progress)
    assert diagnose(seen(loss=52.3, returned=52.4, first=dict(returned=60.0))) == []  # no divergence
    assert outcome_of(seen(loss=2.3, returned=2.5)).progress == pytest.approx(0.0)  # a small penalty
    soft = (replace(LOSS, floor=2.2),)  # of which 0.2 is more than all there is to learn
    assert math.isnan(outcome_of(seen(loss=2.3, returned=2.6, losses=soft, first=dict(returned=2.4))).progress)
    assert outcome_of(seen(loss=2.3, returned=NAN)).progress == pytest.approx(0.0)  # not known
