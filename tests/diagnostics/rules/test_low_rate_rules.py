# SPDX-License-Identifier: Apache-2.0
"""Rules about steps that are too small, and what makes them so."""

import math
from dataclasses import replace

import pytest

from lightning_optkit.diagnostics._observations import ParameterSeen
from lightning_optkit.diagnostics._signals import (
    TargetsSeen,
)
from lightning_optkit.diagnostics.rules import diagnose
from lightning_optkit.diagnostics.rules.last_resorts import input_ignored
from lightning_optkit.diagnostics.rules.rates import lr_too_low
from tests.diagnostics.rules.learning_cases import NAN, PROBE, seen


def test_lr_too_low_needs_other_data_to_gain_too():
    short = replace(PROBE, ten=2.1, thirty=2.0)
    assert lr_too_low(seen(probe=replace(short, other_before=2.3, other_thirty=2.2))) is not None
    assert lr_too_low(seen(probe=replace(short, other_before=2.3, other_thirty=2.3))) is None
    assert lr_too_low(seen(probe=short, validations=(2.3, 2.4))) is None
    first = seen(probe=short, validations=(2.3,))
    assert lr_too_low(first) is None  # the next one tells
    first.is_over = True
    assert lr_too_low(first) is not None
    assert lr_too_low(seen(probe=replace(short, rate=0.04))) is None  # a warm-up
    rising = seen(probe=short, rate_to_come=0.21)  # twice the rate so far
    assert lr_too_low(rising) is None and lr_too_low(seen(probe=short, rate_to_come=0.19)) is not None
    rising.is_over = True
    assert lr_too_low(rising) is not None
    # The loss right after a tiny update differs from that before it by rounding.
    assert lr_too_low(seen(probe=replace(short, full=2.3 + 1e-6))) is not None
    assert lr_too_low(seen(probe=replace(short, ten=2.3 + 1e-6))) is None


def test_updates_that_a_clip_makes_small_are_laid_to_it():
    weights = tuple(
        ParameterSeen(f"net.{i}.weight", f"net.{i}", 9, False, True, True, 1.0, 5e-5, 5e-6, 0.0) for i in range(4)
    )
    run = seen(probe=replace(PROBE, ten=2.1, thirty=2.0), parameters=weights)  # a rate of 0.1
    assert "rate" not in lr_too_low(run).cause and "lr=3" in lr_too_low(run).remedy
    run.clip = 1e-4
    assert "cut to a norm of 0.0001" in lr_too_low(run).cause
    assert lr_too_low(run).remedy.startswith("gradient_clip_val=0.003 in the Trainer")
    for change in (dict(grad_norm=4e-5), dict(update_norm=2e-4)):  # not at the clip; scaled by former gradients
        other = replace(run.checks[2], parameters=tuple(replace(each, **change) for each in weights))
        assert "lr=3" in lr_too_low(replace(run, checks=[*run.checks[:2], other, *run.checks[3:]])).remedy


def test_lr_too_low_is_said_if_other_batches_do_not_gain_but_the_loss_still_falls():
    losses = [2.3 - 0.001 * step + 0.02 * (step % 2) for step in range(100)]
    noisy = replace(PROBE, ten=2.1, thirty=2.0, other_before=2.3, other_thirty=2.31)
    assert lr_too_low(seen(loss=losses, probe=noisy)) is not None
    assert lr_too_low(seen(loss=losses, probe=noisy, validations=(2.4, 2.3, 2.3))) is None  # for these data alone
    assert lr_too_low(seen(loss=losses, probe=noisy, validations=(2.4, 2.3, 2.29))) is not None
    # Updates that are far too small do not go to and fro.
    assert lr_too_low(seen(loss=losses, probe=noisy, validations=(2.4, 2.35, 2.31, 2.32, 2.29))) is None
    assert lr_too_low(seen(loss=losses, probe=noisy, validations=(2.4, 2.41, 2.35, 2.29))) is not None
    assert lr_too_low(seen(loss=[2.2 + 0.02 * (step % 2) for step in range(100)], probe=noisy)) is None
    assert lr_too_low(seen(loss=[0.8 * loss for loss in losses], probe=noisy)) is None  # it learns
    assert lr_too_low(seen(loss=losses, probe=replace(noisy, thirty=2.2))) is None
    for value in (math.inf, NAN):  # skipped by a loss scaler
        assert lr_too_low(seen(loss=[*losses[:70], value, *losses[71:]], probe=noisy)) is None


def test_lr_too_low_of_a_short_run_needs_that_it_has_barely_learned():
    short = replace(PROBE, ten=2.1, thirty=2.0)
    for steps, loss, is_said in ((47, 1.9, True), (47, 1.8, False), (48, 1.8, True)):
        run = seen(loss=loss, steps=steps, probe=short)
        run.is_over = True
        assert (lr_too_low(run) is not None) == is_said


def test_lr_too_low_is_not_said_of_a_run_that_is_on_its_way():
    short = replace(PROBE, ten=2.1, thirty=2.0)
    for loss, is_over, is_said in ((1.5, False, False), (1.8, False, True), (1.5, True, True)):
        run = replace(seen(loss=loss, steps=60, probe=short), is_over=is_over)
        assert (lr_too_low(run) is not None) == is_said


def test_updates_of_which_a_probe_tells_nothing_are_too_small():
    def weights(update):
        return (ParameterSeen("net.1.weight", "net.1", 9, False, True, True, 1.0, 0.1, update, 0.0),)

    still = seen(parameters=weights(1e-7), probe=PROBE)
    assert "100 steps changed the median matrix by 1e-05 of its norm" in lr_too_low(still).evidence
    assert [verdict.symptom for verdict in diagnose(still)] == ["lr_too_low"]  # and not input_ignored
    assert lr_too_low(seen(parameters=weights(1e-4))) is None
    assert lr_too_low(seen(parameters=weights(NAN))) is None
    (dead,) = weights(0.0)
    assert lr_too_low(seen(parameters=(dead,))) is not None
    assert lr_too_low(seen(parameters=(replace(dead, has_gradient=False),))) is None
    assert lr_too_low(seen(loss=0.5, parameters=weights(1e-7))) is None


def test_weights_that_stand_still_learn_nothing_by_heart():
    weights = (ParameterSeen("net.1.weight", "net.1", 9, False, True, True, 1.0, 0.1, 1e-7, 0.0),)
    assert lr_too_low(seen(parameters=weights, probe=PROBE, validations=(2.2, 2.4))) is not None
    moving = (replace(weights[0], update_norm=1e-3),)
    short = replace(PROBE, ten=2.1, thirty=2.0)
    assert lr_too_low(seen(parameters=moving, probe=short, validations=(2.4, 2.4))) is not None
    assert lr_too_low(seen(parameters=moving, probe=short, validations=(2.2, 2.4))) is None


@pytest.mark.parametrize("is_in_gradient", [False, True])
def test_a_weight_decay_that_is_nearly_all_of_the_gradient_is_the_cause(is_in_gradient):
    def run(grad_norm, probe=PROBE, **parts):
        norm = math.hypot(grad_norm, 1.0) if is_in_gradient else grad_norm
        weights = (ParameterSeen("net.1.weight", "net.1", 9, False, True, True, 1.0, norm, 1e-3, 0.0),)
        parts = {"added": 1.0, "is_in_gradient": is_in_gradient, **parts}
        return seen(parameters=weights, probe=probe, **parts)

    (verdict,) = diagnose(run(0.1))
    assert verdict.symptom == "input_ignored" and "weight decay takes the weights to 0" in verdict.cause
    assert "weight_decay=1 made up 100% of the gradients" in verdict.evidence and "AdamW" in verdict.remedy
    for other in (run(0.7), run(0.1, added=0.1)):
        assert "whatever its input: the input carries nothing" in input_ignored(other).cause
    short = replace(PROBE, ten=2.1, thirty=2.0)
    assert lr_too_low(run(0.7, short)) is not None and lr_too_low(run(0.1, short)) is None


def test_lr_too_low_is_not_said_where_other_data_have_gained_all_there_is():
    short = replace(PROBE, ten=2.1, thirty=2.0)
    for values, is_said in (
        ((2.29, 2.25, 2.24, 2.235), False),
        ((2.29, 2.25, 2.21, 2.17), True),  # in a straight line
        ((2.6, 2.4, 2.35, 2.34), True),  # it has not come below a constant prediction
    ):
        run = seen(probe=short, validations=values)
        assert lr_too_low(run) is not None  # the targets are not known
        run.validated = TargetsSeen(2.3, 400, False)
        assert (lr_too_low(run) is not None) == is_said
        run.checks[-1] = replace(run.checks[-1], rate=0.01)  # of a decayed rate any loss levels off
        assert lr_too_low(run) is not None
