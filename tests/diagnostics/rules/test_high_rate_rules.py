# SPDX-License-Identifier: Apache-2.0
"""Rules about steps that are too large, and what they leave behind."""

import math
from dataclasses import replace

import pytest

from lightning_optkit.diagnostics._observations import NonfiniteSeen, ParameterSeen
from lightning_optkit.diagnostics._signals import (
    ActivationSeen,
)
from lightning_optkit.diagnostics.rules import diagnose
from lightning_optkit.diagnostics.rules.labels import shuffled_or_weak
from lightning_optkit.diagnostics.rules.nonfinite import nonfinite
from lightning_optkit.diagnostics.rules.outcome import outcome_of, typical_progress
from lightning_optkit.diagnostics.rules.rates import lr_too_high, lr_too_low
from lightning_optkit.diagnostics.rules.spikes import loss_spike
from tests.diagnostics.rules.learning_cases import INPUT, LAYERS, LOSS, NAN, PROBE, seen


def test_loss_spike_needs_a_run_that_had_learned_and_has_lost_it():
    learned = [2.3] * 8 + [0.5] * 40
    verdict = loss_spike(seen(loss=[*learned, 5.1, *[2.3] * 51]))
    assert verdict.onset_step == 48 and verdict.remedy.startswith("ok.SpikeGuard()")
    assert [each.symptom for each in diagnose(seen(loss=[*learned, 5.1, *[2.3] * 51]))] == ["loss_spike"]
    for after in ([4.9, *[2.2] * 51], [5.1, *[0.5] * 51]):  # not ten times as large; recovered
        assert loss_spike(seen(loss=[*learned, *after])) is None
    assert loss_spike(seen(loss=[*learned, 5.1, *[0.5] * 45, 60.0, *[0.5] * 5])) is None  # of targets with heavy tails
    assert loss_spike(seen(loss=[2.3] * 48 + [24.0] + [2.3] * 51)) is None  # had learned nothing
    assert loss_spike(seen(loss=[0.5] * 31 + [5.1] + [2.3] * 68)) is None  # too early
    weights = tuple(ParameterSeen(f"net.{i}.weight", f"net.{i}", 9, False, True, True, 1.0, 1.0, 0.4, 0.0)
                    for i in range(4))  # fmt: skip
    after_large_steps = seen(loss=[*learned, 5.1, *[2.3] * 51], parameters=weights)
    assert [each.symptom for each in diagnose(after_large_steps)] == ["lr_too_high"]


def test_loss_spike_that_closed_units_is_said_of_a_run_that_has_partly_come_back():
    units = ActivationSeen("net.1", "relu", 0.8, 0.8, 256)
    losses = [2.3] * 8 + [0.3] * 40 + [3.1] + [0.6] * 51
    closed = seen(loss=losses, activations=(units,), first=dict(activations=(replace(units, closed=0.2),)))
    assert "80% of the units of net.1" in loss_spike(closed).evidence
    assert loss_spike(seen(loss=losses)) is None


def test_what_is_not_finite_behind_a_huge_step_is_laid_to_the_rate():
    weights = tuple(ParameterSeen(f"net.{i}.weight", f"net.{i}", 9, False, True, True, 1.0, 1.0, 0.4, 0.0)
                    for i in range(4))  # fmt: skip
    run = seen(parameters=weights, nonfinite=NonfiniteSeen(60, "loss", None, "NaN", 1.0, False))
    verdict = nonfinite(run)
    assert "training diverged: step 4 changed the median matrix by 40% of its norm" in verdict.cause
    assert verdict.remedy.startswith("a tenth of the learning rate, a warm-up")
    for other in (replace(run.nonfinite, where="batch"), replace(run.nonfinite, step=0)):
        assert "diverged" not in nonfinite(replace(run, nonfinite=other)).cause
    small = [replace(check, parameters=tuple(replace(p, update_norm=0.01) for p in weights)) for check in run.checks]
    assert "diverged" not in nonfinite(replace(run, checks=small)).cause


def test_a_summed_loss_explains_steps_that_are_too_large():
    summed = dict(losses=(replace(LOSS, value=2.4 * 64, constant=2.3 * 64, is_summed=True),))
    verdict = lr_too_high(seen(loss=30.0 * 64, **summed))
    assert "sum over the batch" in verdict.cause and verdict.remedy.startswith('reduction="mean" in F.cross_entropy')
    probe = replace(PROBE, permuted=2.4)
    assert shuffled_or_weak(seen(probe=probe, validations=(2.4 * 512, 2.5 * 512), loss=2.3 * 64, **summed)) is None


def test_a_rate_is_not_too_high_and_too_low_at_once():
    weights = tuple(ParameterSeen(f"net.{i}.weight", f"net.{i}", 9, False, True, True, 1.0, 1.0, 0.4, 0.0)
                    for i in range(4))  # fmt: skip
    run = seen(parameters=weights, probe=replace(PROBE, ten=2.1, thirty=2.0))
    assert lr_too_high(run) is not None and lr_too_low(run) is not None
    assert [each.symptom for each in diagnose(run)] == ["lr_too_high"]


def test_lr_too_high_by_divergence_or_by_updates():
    assert "diverges" in lr_too_high(seen(loss=30.0)).cause
    infinite = NonfiniteSeen(60, "forward", "net.3", "NaN", 1e6, False)
    run = seen(loss=[2.3] * 50 + [1e6] * 10 + [NAN] * 40, nonfinite=infinite)
    assert [verdict.symptom for verdict in diagnose(run)] == ["lr_too_high", "nonfinite"]
    weights = tuple(
        ParameterSeen(f"net.{i}.weight", f"net.{i}", 9, False, True, True, 1.0, 1.0, 0.4, 0.0) for i in range(4)
    )
    assert "replace" in lr_too_high(seen(parameters=weights)).cause
    assert lr_too_high(seen(parameters=tuple(replace(each, update_norm=0.2) for each in weights))) is None
    assert lr_too_high(seen(loss=0.2, parameters=weights)) is None
    zeros = tuple(replace(each, gain=0.0) for each in LAYERS)
    assert lr_too_high(seen(parameters=weights, layers=zeros)) is None  # every step from there is large


def test_large_updates_that_are_the_weight_decay_are_laid_to_it():
    weights = tuple(
        ParameterSeen(f"net.{i}.weight", f"net.{i}", 9, False, True, True, 1.0, 1.0, 0.43, 0.0) for i in range(4)
    )
    for decay, is_its_own in ((0.3, True), (0.2, False), (1.0, False), (0.0, False)):
        run = seen(parameters=weights)
        run.checks = [replace(check, decay=decay) for check in run.checks]
        verdict = lr_too_high(run)
        assert verdict.remedy.startswith("weight_decay=0.01, or") == is_its_own
        assert ("weight decay takes away 30% of the weights" in verdict.cause) == is_its_own
    run.checks = [replace(check, decay=0.3, rate=30.0) for check in run.checks]
    assert "weight_decay" not in lr_too_high(run).remedy  # the decay is a usual one: it is the rate that is not


def test_lr_too_high_for_units_that_closed_after_the_first_step():
    def run(change, loss=1.9, first=0.2, now=0.8):
        weights = tuple(ParameterSeen(f"net.{i}.weight", f"net.{i}", 9, False, True, True, 1.0, 1.0, change, 0.0)
                        for i in range(4))  # fmt: skip
        units = ActivationSeen("net.1", "relu", now, now, 256)
        parts = dict(parameters=weights, activations=(units,))
        return seen(loss=loss, first=dict(activations=(replace(units, closed=first),)), **parts)

    verdict = lr_too_high(run(0.2))
    assert "closed units" in verdict.cause and "80% of the ReLUs of net.1" in verdict.evidence
    assert lr_too_high(run(0.05)) is None and lr_too_high(run(0.2, now=0.4)) is None
    assert lr_too_high(run(0.2, first=0.8)) is None  # closed from the start: a cause of its own
    assert lr_too_high(run(0.4, loss=0.5)) is not None and lr_too_high(run(0.4, loss=0.5, now=0.4)) is None
    assert lr_too_high(run(0.2, loss=0.5)) is None and lr_too_high(run(0.4, loss=0.2)) is None


def test_lr_too_high_for_a_loss_that_has_risen():
    assert "diverges" in lr_too_high(seen(loss=[2.3] * 50 + [7.5] * 50)).cause
    assert lr_too_high(seen(loss=[2.3] * 50 + [6.5] * 50)) is None
    assert lr_too_high(seen(loss=7.5)) is None  # it began there


def test_the_lower_rate_goes_by_how_much_the_weights_changed():
    for change, rate in (
        (0.5, "lr=0.006,"),
        (0.91, "ok.LRFinder(), which measures one, or lr=0.003"),
        (0.31, "lr=0.01,"),
    ):
        weights = tuple(ParameterSeen(f"net.{i}.weight", f"net.{i}", 9, False, True, True, 1.0, 1.0, change, 0.0)
                        for i in range(4))  # fmt: skip
        assert lr_too_high(seen(parameters=weights)).remedy.startswith(rate)


def test_a_number_that_is_suddenly_infinite_is_no_divergence():
    sudden = NonfiniteSeen(60, "loss", None, "NaN", 1.0, False)
    run = seen(loss=[2.3] * 60 + [NAN] * 40, nonfinite=sudden, first_input=replace(INPUT, spread=100.0))
    assert [verdict.symptom for verdict in diagnose(run)] == ["nonfinite"]
    assert math.isnan(outcome_of(run).progress)


def test_one_batch_moves_the_mean_of_the_last_losses_but_not_what_is_typical():
    run = seen(loss=[0.23] * 95 + [40.0] + [0.23] * 4)
    assert outcome_of(run).progress < 0 and typical_progress(run) == pytest.approx(0.9, abs=0.001)
    assert typical_progress(seen(loss=[math.nan] * 100)) is math.nan
    assert typical_progress(seen(loss=[0.23] * 90 + [40.0] * 10)) < 0
