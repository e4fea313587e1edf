# SPDX-License-Identifier: Apache-2.0
"""Rules with a threshold, on numbers that are written down: what each needs, and that a run that learns is let be."""

import math
from dataclasses import replace

import pytest

from lightning_optkit.diagnostics._observations import Check, Losses, NonfiniteSeen, ParameterSeen, RunSeen
from lightning_optkit.diagnostics._signals import (
    ActivationSeen,
    AssociationSeen,
    DependenceSeen,
    InputSeen,
    LayerSeen,
    LossSeen,
    ProbeSeen,
    TargetsSeen,
)
from lightning_optkit.diagnostics.rules import diagnose
from lightning_optkit.diagnostics.rules.classes import class_imbalance
from lightning_optkit.diagnostics.rules.course import overfitting
from lightning_optkit.diagnostics.rules.labels import label_shuffle, shuffled_or_weak
from lightning_optkit.diagnostics.rules.last_resorts import constant_input, input_ignored
from lightning_optkit.diagnostics.rules.loss_function import loss_does_not_match_output
from lightning_optkit.diagnostics.rules.nonfinite import nonfinite
from lightning_optkit.diagnostics.rules.outcome import outcome_of, typical_progress
from lightning_optkit.diagnostics.rules.rates import lr_too_high, lr_too_low
from lightning_optkit.diagnostics.rules.scales import (
    bad_init_scale,
    exploding_gradient,
    unnormalized_input,
    unscaled_target,
    vanishing_gradient,
)
from lightning_optkit.diagnostics.rules.spikes import loss_spike
from lightning_optkit.diagnostics.rules.units import dead_units, saturated_units

NAN = math.nan
LOSS = LossSeen("cross_entropy", None, 10, True, False, "(8, 10) and (8,)", 0.0, NAN, NAN, 0.5, 2.4, 2.3)
LAYERS = tuple(LayerSeen(f"net.{i}", 1.0, 1.0, 1e-3, 1.4) for i in range(4))
INPUT = InputSeen("net.0", 1.0, 2.0, 0.0, False)
PROBE = ProbeSeen(
    0.1, before=2.3, tenth=2.29, full=2.2, ten=2.4, thirty=9.0, permuted=2.3, other_before=NAN, other_thirty=NAN
)
RULES = (
    unnormalized_input, unscaled_target, bad_init_scale, vanishing_gradient, exploding_gradient, dead_units,
    saturated_units, loss_spike, lr_too_high, lr_too_low, input_ignored, label_shuffle, shuffled_or_weak,
)  # fmt: skip


def seen(loss=2.3, steps=100, validations=(), nonfinite=None, first=None, **parts):
    """A run of 100 steps that ends with this loss and had the same check five times."""
    check = Check(0, 0.1, **{"losses": (LOSS,), "layers": LAYERS, "first_input": INPUT, **parts})
    checks = [replace(check, step=step, **(first or {} if step == 0 else {})) for step in range(5)]
    losses = Losses()
    for value in loss if isinstance(loss, list) else [loss] * steps:
        losses.append(value)
    return RunSeen(
        steps=steps, steps_planned=100, losses=losses, checks=checks, validations=[*validations], nonfinite=nonfinite
    )  # fmt: skip


CASES = {
    "a spread": (unnormalized_input, dict(first_input=replace(INPUT, spread=31.0))),
    "an offset": (unnormalized_input, dict(first_input=replace(INPUT, offset=0.6))),
    "a scale": (unnormalized_input, dict(first_input=replace(INPUT, rms=11.0))),
    "targets": (unscaled_target, dict(losses=(replace(LOSS, target_mean=150.0, target_std=1.0),))),
    "wide targets": (unscaled_target, dict(losses=(replace(LOSS, target_mean=0.0, target_std=11.0),))),
    "large weights": (bad_init_scale, dict(layers=tuple(replace(each, gain=2.1) for each in LAYERS))),
    "small weights": (bad_init_scale, dict(layers=tuple(replace(each, gain=0.1) for each in LAYERS))),
    "fading": (vanishing_gradient, dict(layers=(replace(LAYERS[0], grad_rms=0.9e-6), *LAYERS[1:]))),
    "growing": (exploding_gradient, dict(layers=(replace(LAYERS[0], grad_rms=1.1), *LAYERS[1:]))),
    "dead": (dead_units, dict(activations=(ActivationSeen("net.1", "relu", 0.6, 0.55, 256),))),
    "saturated": (saturated_units, dict(activations=(ActivationSeen("net.1", "tanh", 0.6, 0.55, 256),))),
    "overshooting": (lr_too_high, dict(probe=replace(PROBE, full=2.31))),
    "falling short": (lr_too_low, dict(probe=replace(PROBE, ten=2.1, thirty=2.0))),
    "ignored": (input_ignored, dict(probe=replace(PROBE, permuted=2.31))),
    "a weak signal": (shuffled_or_weak, dict(probe=replace(PROBE, permuted=2.4), validations=(2.4, 2.6))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_speaks_alone_and_only_of_a_run_that_learns_badly(case):
    rule, parts = CASES[case]
    run = seen(**parts)
    symptom = "label_shuffle" if rule is shuffled_or_weak else rule.__name__
    assert rule(run).symptom == symptom
    assert [verdict.symptom for verdict in diagnose(run)] == [symptom]
    assert diagnose(seen(loss=0.05, **parts)) == []
    assert diagnose(seen(steps=40, **parts)) == []  # too early
    assert diagnose(seen(**{**parts, "losses": ()})) == []  # nothing to measure it by


def test_a_run_without_any_of_it_has_none():
    assert [rule(seen(probe=PROBE, validations=(2.3, 2.3))) for rule in RULES if rule is not input_ignored] == [
        None
    ] * 12
    assert diagnose(seen(loss=0.1, probe=PROBE)) == []


def test_unnormalized_input_is_said_until_a_run_learns_well():
    wide = dict(first_input=replace(INPUT, spread=100.0))
    assert unnormalized_input(seen(loss=0.3, **wide)) is not None
    assert unnormalized_input(seen(loss=0.2, **wide)) is None
    assert unnormalized_input(seen(first_input=replace(INPUT, spread=29.0, offset=0.4, rms=9.0))) is None
    assert unnormalized_input(seen(first_input=None)) is None


def test_targets_that_the_network_begins_with_need_no_scale():
    raw = replace(LOSS, target_mean=150.0, target_std=77.0, constant=5900.0, value=6500.0, output_std=16.0)
    for changes, is_said in (({}, False), (dict(value=28_000.0), True), (dict(output_std=0.3), True)):
        verdict = unscaled_target(seen(loss=5800.0, losses=(replace(raw, **changes),)))
        assert (verdict is not None) == is_said
    assert "y_train.mean()" in verdict.remedy and not any(letter in verdict.remedy for letter in "0123456789")


def test_large_weights_are_said_if_the_loss_begins_high():
    large = dict(layers=tuple(replace(each, gain=2.1) for each in LAYERS))
    high = dict(losses=(replace(LOSS, value=4.7),))
    assert bad_init_scale(seen(loss=0.3, **high, **large)) is not None
    assert bad_init_scale(seen(loss=0.3, losses=(replace(LOSS, value=4.5),), **large)) is None
    assert bad_init_scale(seen(loss=0.2, **high, **large)) is None  # it learns well,
    assert bad_init_scale(seen(loss=0.01, validations=(3.0, 0.3), **high, **large)) is not None  # by heart
    assert bad_init_scale(seen(loss=0.01, validations=(3.0, 0.2), **high, **large)) is None
    assert bad_init_scale(seen(loss=0.3, steps=40, **high, **large)) is None  # too early
    assert bad_init_scale(seen(layers=LAYERS[:1])) is None


def test_small_weights_come_before_the_gradient_that_they_make_fade():
    small = tuple(replace(each, gain=0.1) for each in LAYERS)
    fading = (replace(small[0], grad_rms=0.9e-6), *small[1:])
    assert [each.symptom for each in diagnose(seen(loss=0.5, layers=fading))] == [
        "bad_init_scale",
        "vanishing_gradient",
    ]
    assert diagnose(seen(loss=0.5, layers=small)) == []


def test_gradients_that_are_zero_or_unknown_are_not_compared():
    for grad in (0.0, NAN):
        layers = (replace(LAYERS[0], grad_rms=grad), *LAYERS[1:])
        assert vanishing_gradient(seen(layers=layers)) is None
    assert vanishing_gradient(seen(layers=(replace(LAYERS[0], grad_rms=1.1e-6), *LAYERS[1:]))) is None


def test_units_that_were_open_at_first_are_a_consequence():
    now = ActivationSeen("net.1", "relu", 0.9, 0.9, 256)
    assert dead_units(seen(activations=(now,), first=dict(activations=(replace(now, closed=0.2),)))) is None
    assert dead_units(seen(activations=(replace(now, samples=64),))) is None
    whole = replace(now, closed=1.0, closed_since=1.0, samples=32, units=8)
    assert dead_units(seen(activations=(whole,))) is not None  # a small set of data has no more in four batches
    for few in (dict(samples=31), dict(units=7), dict(closed_since=0.99)):
        assert dead_units(seen(activations=(replace(whole, **few),))) is None
    assert dead_units(seen(activations=(replace(now, closed_since=0.3),))) is None  # closed for one batch


def test_dead_units_are_laid_to_biases_that_are_most_of_what_their_layer_gives():
    dead = dict(activations=(ActivationSeen("net.1", "relu", 0.6, 0.6, 256),))
    low = (LAYERS[0], replace(LAYERS[1], bias=-0.6), *LAYERS[2:])
    verdict = dead_units(seen(layers=low, **dead))
    assert "bias of net.1 is so low" in verdict.cause and 'get_parameter("net.1.bias")' in verdict.remedy
    for bias in (-0.4, 0.6):
        other = dead_units(seen(layers=(replace(LAYERS[0], bias=bias), *LAYERS[1:]), **dead))
        assert "bias" not in other.cause and other.symptom == "dead_units"


def test_a_fading_gradient_is_laid_to_sigmoids_where_half_of_the_layers_have_one():
    layers, sigmoid = (replace(LAYERS[0], grad_rms=0.9e-6), *LAYERS[1:]), ActivationSeen("", "sigmoid", 0.0, 0.0, 256)
    verdict = vanishing_gradient(seen(layers=layers, activations=(sigmoid,) * 2))
    assert verdict.cause.startswith("each of 2 sigmoid layers") and verdict.remedy.startswith("nn.ReLU() in place of")
    for activations in ((sigmoid,), (replace(sigmoid, function="tanh"),) * 2):
        assert "sigmoid" not in vanishing_gradient(seen(layers=layers, activations=activations)).cause


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


def test_shuffled_or_weak_needs_validations_that_never_held():
    probe = replace(PROBE, permuted=2.4)
    assert shuffled_or_weak(seen(probe=probe, validations=(2.4, 2.5, 2.6))) is not None
    assert shuffled_or_weak(seen(probe=probe, validations=(2.1, 2.4, 2.6))) is None  # it held once
    assert shuffled_or_weak(seen(loss=1.0, probe=probe, validations=(1.9, 2.4, 2.6))) is None  # overfitting
    assert shuffled_or_weak(seen(loss=1.0, probe=probe, validations=(2.35, 2.9))) is not None
    assert shuffled_or_weak(seen(probe=probe, validations=(2.4, 2.6, 2.36))) is None  # other targets may make so much
    assert shuffled_or_weak(seen(probe=probe, validations=(2.4,))) is None
    assert shuffled_or_weak(seen(probe=PROBE, validations=(2.4, 2.6))) is None


def test_shuffled_or_weak_of_targets_that_were_not_seen_allows_for_other_ones():
    probe, numbers = replace(PROBE, permuted=2.4), replace(LOSS, function="mse_loss", target_mean=0.0, target_std=1.5)
    for values, is_said in (((2.4, 2.5), False), ((2.4, 2.6), True), ((2.0, 2.6), True), ((1.9, 2.6), False)):
        assert (shuffled_or_weak(seen(probe=probe, validations=values, losses=(numbers,))) is not None) == is_said


def test_shuffled_or_weak_is_judged_by_the_targets_of_the_validation():
    def verdict(values, samples=400, is_squared=False, constant=2.5):
        run = seen(probe=replace(PROBE, permuted=2.4), validations=values)  # 0.1 / 2.3 of 2.5 is 0.109
        run.validated = TargetsSeen(constant, samples, is_squared)
        return shuffled_or_weak(run)

    assert verdict((2.51, 2.6)) is not None and verdict((2.3, 2.4)) is None and verdict((2.3, 2.6)) is None
    assert "2.5 is that of a constant prediction of its targets" in verdict((2.51, 2.6)).evidence
    assert "say too little" in verdict((2.51, 2.6)).cause and verdict((2.51, 2.6)).confidence == 0.5
    error = (0.1 / 2.3 * 2.5 / 400) ** 0.5
    assert verdict((2.5 - 1.9 * error, 2.6)) is not None and verdict((2.5 - 2.1 * error, 2.6)) is None
    assert verdict((2.51, 2.5 + 1.6 * error)) is not None and verdict((2.51, 2.5 + 1.4 * error)) is None
    assert verdict((2.51, 2.5 + 1.6 * error), samples=100) is None
    squared = (2 * 2.5 * 0.1 / 2.3 * 2.5 / 400) ** 0.5
    for errors in (1.4, 1.6):
        assert (verdict((2.51, 2.5 + errors * squared), is_squared=True) is not None) == (errors > 1.5)


def test_label_shuffle_of_training_targets_that_go_otherwise_with_inputs_than_those_of_the_validation():
    def verdict(
        fresh=(0.001, 0.004), held=(0.03, 0.005), values=(2.28, 2.2), constant=2.3, scatter=1.0, samples=733, **parts
    ):
        run = seen(**{"probe": PROBE, "validations": values, **parts})
        run.validated = TargetsSeen(constant, 360, False)
        run.fresh, run.held = AssociationSeen(*fresh, samples, 18, scatter), AssociationSeen(*held, 360)
        return label_shuffle(run)

    assert "0.03 less loss with their own" in verdict().evidence and "733 training samples" in verdict().evidence
    assert "0.03 more loss" in verdict(held=(-0.03, 0.005)).evidence
    assert verdict(loss=0.5) is not None and verdict(loss=0.1) is None  # learned by heart; all of it
    assert verdict(fresh=(0.012, 0.004)) is None  # by chance
    assert verdict(samples=99) is None  # too few to be alike
    assert verdict(scatter=1.9) is not None and verdict(scatter=2.1) is None  # it goes to and fro
    assert verdict(fresh=(0.012, 0.001), held=(0.03, 0.001)) is None  # a weak signal that grows
    assert verdict(fresh=(-0.03, 0.004), held=(0.001, 0.005)) is None  # the validation says nothing
    assert verdict(values=(2.28, 1.8)) is None  # what was learned holds
    assert verdict(constant=2.9) is None and verdict(constant=1.9, values=(1.9, 1.9)) is None  # other frequencies
    assert verdict(losses=(RARE,)) is None and verdict(steps=40) is None and verdict(values=(2.28,)) is None


def test_label_shuffle_of_training_targets_of_which_outputs_tell_less_than_of_those_of_the_validation():
    def verdict(
        fresh=0.01, held=2.0, deviates=20.0, samples=733, columns=90, free=(721, 359), values=(2.31, 2.35),
        deviates_of_training=0.5, gain=0.001,
    ):  # fmt: skip
        run = seen(probe=replace(PROBE, permuted=2.4), validations=values)
        run.validated = TargetsSeen(2.3, 360, False)
        of_training = DependenceSeen(fresh, deviates_of_training, columns, free[0])
        of_validation = DependenceSeen(held, deviates, columns, free[1])
        run.fresh = AssociationSeen(gain, 0.004, samples, 18, 1.0, of_training)
        run.held = AssociationSeen(0.001, 0.005, 360, 1, 1.0, of_validation)
        (found,) = diagnose(run)
        return found

    assert verdict().symptom == "label_shuffle" and verdict().confidence == 0.85
    assert "came to 2 beyond chance in the validation, and to 0.01 in 733 training samples" in verdict().evidence
    for weak in (
        dict(held=0.1, deviates=2.9),  # the validation may have nothing to tell
        dict(held=0.1, deviates=3.1),  # as chance makes of training batches
        dict(fresh=0.7),  # over a third, as batches before the validation
        dict(free=(40, 40), held=0.9),  # too few to tell
        dict(samples=99),
        dict(deviates_of_training=3.1),  # they go with inputs, be it less: outputs turn while a network learns
    ):
        assert verdict(**weak).confidence == 0.5
    assert verdict(gain=0.011).symptom == "label_shuffle"
    run = seen(probe=PROBE, validations=(2.2, 1.8))
    run.validated = TargetsSeen(2.3, 360, False)
    run.fresh = AssociationSeen(0.001, 0.004, 733, 18, 1.0, DependenceSeen(0.01, 0.5, 90, 721))
    run.held = AssociationSeen(0.001, 0.005, 360, 1, 1.0, DependenceSeen(2.0, 20.0, 90, 359))
    assert label_shuffle(run) is None  # what was learned holds


def test_a_signal_is_not_weak_if_labels_went_with_inputs_before_they_were_trained_on():
    run = seen(probe=replace(PROBE, permuted=2.4), validations=(2.4, 2.6))
    for gain, is_said in ((0.029, True), (0.031, False)):
        run.fresh = AssociationSeen(gain, 0.01, 733)
        assert (shuffled_or_weak(run) is not None) == is_said


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


def test_equal_inputs_explain_everything_else():
    dead = (ActivationSeen("net.1", "relu", 0.6, 0.6, 256),)
    run = seen(first_input=replace(INPUT, is_constant=True), activations=dead)
    assert constant_input(run).confidence == 1.0
    assert [verdict.symptom for verdict in diagnose(run)] == ["input_ignored"]


RARE = replace(LOSS, common=2, num_common=58, missed_common=1, num_others=6, missed_others=4)


def test_class_imbalance_is_said_of_rare_classes_that_are_missed_whatever_the_loss():
    run = seen(loss=0.2, losses=(RARE,))
    run.checks = [replace(check, step=60 + check.step) for check in run.checks]
    assert [verdict.symptom for verdict in diagnose(run)] == ["class_imbalance"]
    verdict = class_imbalance(run)
    assert "91% of the samples are of class 2" in verdict.cause and "20 of 30" in verdict.evidence
    for changes in (
        dict(missed_others=2),  # the others are learned
        dict(missed_common=7),  # nothing is
        dict(num_common=23),  # no class has four fifths
        dict(common=-1),
        dict(num_others=1, missed_others=1),  # too few to tell
    ):
        other = replace(run, checks=[replace(c, losses=(replace(RARE, **changes),)) for c in run.checks])
        assert class_imbalance(other) is None, changes
    early = seen(loss=0.2, losses=(RARE,))  # measured in the first half alone
    assert class_imbalance(early) is None
    turns = [replace(c, losses=(replace(RARE, common=c.step % 2),)) for c in run.checks]
    assert class_imbalance(replace(run, checks=turns)) is None


def test_targets_that_never_vary():
    run = seen(loss=0.0, losses=(replace(LOSS, common=3, num_common=200, constant=0.0),))
    assert [verdict.symptom for verdict in diagnose(run)] == ["class_imbalance"]
    assert "all targets are of class 3" in class_imbalance(run).cause
    few = [replace(c, losses=(replace(c.losses[0], num_common=199),)) for c in run.checks]
    assert class_imbalance(replace(run, checks=few)) is None
    one = [*run.checks[:-1], replace(run.checks[-1], losses=(replace(run.checks[-1].losses[0], num_others=1),))]
    assert class_imbalance(replace(run, checks=one)) is None


def test_a_dominant_class_leaves_no_constant_to_judge_a_validation_by():
    probe = replace(PROBE, permuted=2.4)
    assert shuffled_or_weak(seen(probe=probe, validations=(2.4, 2.5), losses=(RARE,))) is None
    assert overfitting(overfitted(losses=(RARE,))) is None


def overfitted(values=(1.5, 1.0, 0.9, 1.3, 1.4, 1.5), trained=(1.4, 1.0, 0.8, 0.4, 0.2, 0.1), **parts):
    run = seen(**{"loss": 0.1, "validations": values, **parts})
    run.trained = [*trained]
    return run


def test_overfitting_is_said_of_what_was_lost_while_the_training_loss_halved():
    assert overfitting(overfitted()).onset_step == 3 * 100 // 6
    assert [verdict.symptom for verdict in diagnose(overfitted())] == ["overfitting"]
    assert overfitting(overfitted((1.5, 1.0, 0.9, 1.2, 1.4, 1.5))) is None  # a quarter of 2.3 - 0.9 is 0.35
    assert overfitting(overfitted((1.5, 1.0, 0.9, 1.3, 1.2, 1.5))) is None  # it was better since
    assert overfitting(overfitted((1.5, 1.4, 1.0, 0.9, 1.4, 1.5))) is None  # two evaluations since
    assert overfitting(overfitted((0.3, 0.1, 0.05, 0.2, 0.3, 0.4))) is None  # little beside a constant
    assert overfitting(overfitted((2.6, 2.5, 2.2, 3.1, 3.4, 3.5))) is None  # it never held: labels
    assert overfitting(overfitted((2.2, 2.2, 2.1, 2.25, 2.25, 2.25))) is None  # a tenth of 2.1 is 0.21
    assert overfitting(overfitted((1.5, NAN, 0.9, 1.3, 1.4, 1.5))) is None
    assert overfitting(overfitted(trained=(1.4, 1.0, 0.8, 0.6, 0.6, 0.6))) is None  # the training has not gone on
    assert overfitting(overfitted(trained=[NAN] * 6)) is None
    assert overfitting(overfitted(steps=40)) is None  # too early
    assert overfitting(overfitted(losses=())) is None


def test_a_class_that_training_does_not_have_is_named_in_the_sentence():
    batch = replace(LOSS, common=0, num_common=20, num_others=44, present=(0, 1))
    run = overfitted(losses=(batch,))
    run.validated = TargetsSeen(2.3, 100, False, counts=(45, 45, 7, 3))
    verdict = overfitting(run)
    assert verdict.symptom == "overfitting" and "no sample of class 2" in verdict.cause and "stratify" in verdict.remedy
    assert "7% of the validation are of class 2, and none of the 320 training samples" in verdict.evidence
    run.validated = TargetsSeen(2.3, 100, False, counts=(49, 49, 2, 0))  # of 320 samples none in one of 640 runs
    assert "by heart" in overfitting(run).cause
    run = overfitted(losses=(replace(batch, present=()),))  # pixels, say
    run.validated = TargetsSeen(2.3, 100, False, counts=(45, 45, 7, 3))
    assert "by heart" in overfitting(run).cause


def test_the_remedy_of_overfitting_names_the_loss_that_was_logged():
    assert overfitting(overfitted()).remedy.startswith('ok.EarlyStoppingCriterion("GL", alpha=5.0), ')
    run = overfitted()
    run.monitor = "val/loss"
    assert overfitting(run).remedy.startswith('ok.EarlyStoppingCriterion("GL", alpha=5.0, monitor="val/loss"), ')


@pytest.mark.parametrize(
    "changes",
    [
        dict(behind="softmax"),
        dict(function="binary_cross_entropy_with_logits", behind="sigmoid"),
        dict(function="nll_loss", is_log=False),
        dict(classes=1),
        dict(function="binary_cross_entropy", behind="softmax", is_one=True),
        dict(function="nll_loss", behind="softmax"),
        dict(function="mse_loss", is_broadcast=True),
        dict(function="mse_loss", behind="relu", outside=0.1),
    ],
)
def test_loss_does_not_match_output_whatever_the_run_learns(changes):
    assert loss_does_not_match_output(seen(loss=0.01, losses=(replace(LOSS, **changes),))) is not None
    assert loss_does_not_match_output(seen(losses=(replace(LOSS, **changes),), first=dict(losses=(LOSS,)))) is None


def test_only_what_the_loss_contains_is_said_to_be_in_it():
    for behind, is_contained in (("softmax", True), ("sigmoid", True), ("relu", False), ("tanh", False)):
        remedy = loss_does_not_match_output(seen(losses=(replace(LOSS, behind=behind),))).remedy
        assert ("contains" in remedy) == is_contained and f"leave {behind} out" in remedy


def test_losses_that_match():
    for changes in (
        dict(function="mse_loss", behind="relu"),
        dict(function="nll_loss"),
        dict(function="nll_loss", behind="relu"),  # logits may be cut
    ):
        assert loss_does_not_match_output(seen(losses=(replace(LOSS, **changes),))) is None


def test_a_mechanical_fault_explains_why_it_learns_badly():
    run = seen(probe=replace(PROBE, full=2.31))
    run.not_zeroed = {"SGD": 1}
    assert [verdict.symptom for verdict in diagnose(run)] == ["gradient_not_zeroed"]


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
