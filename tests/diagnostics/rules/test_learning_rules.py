# SPDX-License-Identifier: Apache-2.0
"""Rules about how a run learns: what each needs, and that it is silent of a run that learns well."""

from dataclasses import replace

import pytest

from lightning_optkit.diagnostics._signals import (
    ActivationSeen,
)
from lightning_optkit.diagnostics.rules import diagnose
from lightning_optkit.diagnostics.rules.labels import label_shuffle, shuffled_or_weak
from lightning_optkit.diagnostics.rules.last_resorts import input_ignored
from lightning_optkit.diagnostics.rules.loss_function import loss_does_not_match_output
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
from tests.diagnostics.rules.learning_cases import INPUT, LAYERS, LOSS, NAN, PROBE, seen

RULES = (
    unnormalized_input, unscaled_target, bad_init_scale, vanishing_gradient, exploding_gradient, dead_units,
    saturated_units, loss_spike, lr_too_high, lr_too_low, input_ignored, label_shuffle, shuffled_or_weak,
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
