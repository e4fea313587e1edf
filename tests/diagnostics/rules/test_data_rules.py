# SPDX-License-Identifier: Apache-2.0
"""Rules about data: labels, classes, inputs that tell nothing, and what is learned by heart."""

from dataclasses import replace

from lightning_optkit.diagnostics._signals import (
    ActivationSeen,
    AssociationSeen,
    DependenceSeen,
    TargetsSeen,
)
from lightning_optkit.diagnostics.rules import diagnose
from lightning_optkit.diagnostics.rules.classes import class_imbalance
from lightning_optkit.diagnostics.rules.course import overfitting
from lightning_optkit.diagnostics.rules.labels import label_shuffle, shuffled_or_weak
from lightning_optkit.diagnostics.rules.last_resorts import constant_input
from tests.diagnostics.rules.learning_cases import INPUT, LOSS, NAN, PROBE, seen


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
