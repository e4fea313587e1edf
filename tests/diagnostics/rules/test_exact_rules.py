# SPDX-License-Identifier: Apache-2.0
"""Rules on numbers that are written down: what each needs, and where it stays silent."""

import math
from dataclasses import replace

import pytest

from lightning_optkit.diagnostics._observations import (
    AverageSeen,
    Check,
    IdleSeen,
    Losses,
    ModuleSeen,
    NonfiniteSeen,
    ParameterSeen,
    RanksSeen,
    RowsSeen,
    RunSeen,
    ScheduleSeen,
    SilentSeen,
)
from lightning_optkit.diagnostics._signals import LossSeen
from lightning_optkit.diagnostics.rules import diagnose, is_exact, ranked
from lightning_optkit.diagnostics.rules.gradients import gradient_not_zeroed, lost_updates, no_gradient, not_optimized
from lightning_optkit.diagnostics.rules.loss_function import loss_does_not_match_output
from lightning_optkit.diagnostics.rules.nonfinite import nonfinite
from lightning_optkit.diagnostics.rules.processes import duplicate_data, ranks_diverge
from lightning_optkit.diagnostics.rules.schedules import schedule_fault
from lightning_optkit.diagnostics.rules.setup import average_not_ready, symmetric_init, wrong_mode
from lightning_optkit.diagnostics.verdict import ONCE

PARAM = ParameterSeen("net.weight", "net", 100, True, True, True, 1.0, 0.1, 0.01, 0.9)
ROWS = RowsSeen("net.weight", "net", 8, 0.5, 0.0, True)
DROPOUT = ModuleSeen("net.drop", "dropout", False, True, True, False)
NORM = ModuleSeen("net.norm", "batch norm", False, True, True, True)
IDLE = IdleSeen(step=0, batches=4, params=6, frozen=0, strays=0, with_grad=6, is_manual=True, own=6, arrived=6)
SCHEDULE = ScheduleSeen(
    name="CosineAnnealingLR", optimizer="SGD", interval="step", frequency=1, length=100, returns=True, calls=50,
    steps=50, epochs=5, steps_planned=100, epochs_planned=10, zero_first=0, zero_last=0, follows_metric=False,
)  # fmt: skip


def checks(*parts, rates=None, **kinds):
    """One check per list of parts, at steps 0, 1, ..."""
    rates = rates or [0.1] * len(parts)
    (kind,) = kinds.values()
    made = [
        Check(step, rate, **{kind: tuple(part)}) for step, (part, rate) in enumerate(zip(parts, rates, strict=True))
    ]
    return RunSeen(steps=len(parts), checks=made)


def test_a_run_of_which_nothing_was_seen_is_not_judged():
    assert diagnose(RunSeen()) == []


def test_no_gradient_needs_a_called_module_and_twenty_steps():
    silent = SilentSeen("net.0.weight", "net.0", 20, True, False)
    assert "detach" in no_gradient(RunSeen(silent=[silent])).cause
    assert "no_grad" in no_gradient(RunSeen(silent=[replace(silent, runs_without_grad=True)])).cause
    assert no_gradient(RunSeen(silent=[replace(silent, steps=19)])) is None
    assert is_exact(no_gradient(RunSeen(silent=[replace(silent, steps=4, runs_without_grad=True)])))
    assert not is_exact(no_gradient(RunSeen(silent=[replace(silent, steps=3, runs_without_grad=True)])))
    assert no_gradient(RunSeen(silent=[replace(silent, is_called=False)])) is None
    own = no_gradient(RunSeen(silent=[replace(silent, name="prompt", layer="")]))
    assert own.layer == "prompt" and own.remedy.startswith("pass what is computed from prompt on")


def test_no_gradient_names_the_layer_nearest_to_where_it_ends():
    names = [SilentSeen(f"net.{i}.weight", f"net.{i}", 30, True, False) for i in range(5)]
    verdict = no_gradient(RunSeen(silent=names))
    assert verdict.layer == "net.4" and "net.0.weight, net.1.weight, net.2.weight and 2 more" in verdict.evidence


def test_no_gradient_of_steps_without_a_backward_pass():
    assert "manual_backward" in no_gradient(RunSeen(vain=20)).remedy
    assert no_gradient(RunSeen(vain=19)) is None


def test_not_optimized_needs_a_gradient_twice():
    out = replace(PARAM, name="head.weight", layer="head", is_optimized=False)
    assert not_optimized(checks([PARAM, out], [PARAM, out], kind="parameters")).layer == "head"
    assert is_exact(not_optimized(checks([PARAM, out], [PARAM, out], kind="parameters")))
    assert not is_exact(not_optimized(checks([PARAM, out], kind="parameters")))  # it stands no longer than it is seen
    assert not_optimized(checks([PARAM, out], [PARAM, replace(out, is_optimized=True)], kind="parameters")) is None
    assert not_optimized(checks([PARAM, out], [PARAM, replace(out, has_gradient=False)], kind="parameters")) is None


def test_not_optimized_says_why_nothing_changes():
    assert "self.optimizers().step()" in not_optimized(RunSeen(idle=IDLE)).remedy
    assert "optimizer_step" in not_optimized(RunSeen(idle=replace(IDLE, is_manual=False))).remedy
    cleared = replace(IDLE, with_grad=0)
    assert "nothing is left" in not_optimized(RunSeen(idle=cleared)).cause
    assert "manual_backward" in not_optimized(RunSeen(idle=cleared)).remedy
    assert "manual_backward" not in not_optimized(RunSeen(idle=replace(cleared, is_manual=False))).remedy
    assert "requires a gradient" in not_optimized(RunSeen(idle=replace(IDLE, frozen=6))).cause
    strange = not_optimized(RunSeen(idle=replace(IDLE, strays=6, batches=1)))
    assert "replaced" in strange.cause and "another one" in strange.cause and "self.parameters()" in strange.remedy
    assert strange.evidence.startswith("a batch had a backward pass, and no weight changed")
    assert all(no_gradient(RunSeen(idle=idle)) is None for idle in (IDLE, cleared))


def test_no_step_since_what_is_trained_is_in_no_optimizer():
    idle = replace(IDLE, with_grad=0, arrived=2, outside=("net.0.weight", "net.0.bias"))
    (verdict,) = diagnose(RunSeen(idle=idle))
    assert (verdict.symptom, verdict.layer) == ("not_optimized", "net.0") and "no group" in verdict.cause
    assert "net.0.weight, net.0.bias have gradients" in verdict.evidence and "self.parameters()" in verdict.remedy
    assert "nothing is left" in not_optimized(RunSeen(idle=replace(idle, arrived=3))).cause  # one was cleared


def test_no_gradient_arrives_anywhere():
    cut = replace(IDLE, with_grad=0, arrived=0, is_manual=False)
    (verdict,) = diagnose(RunSeen(idle=cut))
    assert (verdict.symptom, verdict.layer) == ("no_gradient", None) and "does not depend" in verdict.cause
    assert "none of 6 parameters" in verdict.evidence
    assert no_gradient(RunSeen(idle=replace(cut, frozen=6))) is None


def test_not_optimized_knows_layers_in_a_list():
    hidden, nothing = dict(hidden=("net.blocks[0].weight", "net.blocks[0].bias")), {}
    made = [Check(step, 0.1, **parts) for step, parts in enumerate((nothing, hidden, hidden))]
    verdict = not_optimized(RunSeen(checks=made))
    assert (verdict.layer, verdict.onset_step) == ("net.blocks[0]", 1) and "held in a list" in verdict.cause
    assert verdict.remedy.startswith("self.net.blocks = torch.nn.ModuleList(") and is_exact(verdict)
    assert not is_exact(not_optimized(RunSeen(checks=made[1:2])))
    assert not_optimized(RunSeen(checks=made[:2])) is None


def test_not_optimized_knows_layers_that_were_replaced():
    out = replace(PARAM, is_optimized=False)
    run = checks([out], [out], kind="parameters")
    assert not_optimized(run) is None  # a wrapper holds other tensors than the module, perhaps
    run.checks[-1] = replace(run.checks[-1], strays=1)
    assert "replaced" in not_optimized(run).cause


def test_gradient_not_zeroed_names_the_optimizer_and_the_step():
    verdict = gradient_not_zeroed(RunSeen(not_zeroed={"SGD": 4}))
    assert (verdict.layer, verdict.onset_step) == ("SGD", 4)
    assert gradient_not_zeroed(RunSeen()) is None


def test_lost_updates_are_those_that_are_put_back_twice():
    run = checks([PARAM], [PARAM], [PARAM], kind="parameters")
    run.checks[1] = replace(run.checks[1], is_undone=True)
    run.checks[0] = replace(run.checks[0], rate=0.0)
    kept = replace(PARAM, lost=0.0)
    run.checks[:] = [replace(check, parameters=(kept,)) for check in run.checks]
    assert lost_updates(run) is None  # a rollback goes back once
    run.checks[2] = replace(run.checks[2], is_undone=True)
    verdict = lost_updates(run)
    assert verdict.onset_step == 0 and "puts the weights back" in verdict.cause


def test_lost_updates_are_judged_where_the_rate_is_first_at_its_highest():
    kept = replace(PARAM, lost=0.1)
    assert lost_updates(checks([PARAM], [PARAM], kind="parameters")).layer == "net"
    assert lost_updates(checks([PARAM], kind="parameters")) is None
    assert lost_updates(checks([kept], [kept], [PARAM], [PARAM], kind="parameters")) is None  # it has learned
    assert lost_updates(checks([PARAM], [PARAM], rates=[0.1, 0.2], kind="parameters")) is None  # a warm-up
    assert lost_updates(checks([PARAM], [PARAM], rates=[0.1, 0.01], kind="parameters")) is None  # a decay
    assert lost_updates(checks([PARAM], [kept], [kept], rates=[0.1, 0.2, 0.2], kind="parameters")) is None
    wide = replace(PARAM, is_narrow=False)
    assert lost_updates(checks([wide], [wide], kind="parameters")) is None
    most = replace(kept, numel=10_000)
    assert lost_updates(checks([PARAM, most], [PARAM, most], kind="parameters")) is None


def test_lost_updates_of_a_rate_that_will_rise_are_none():
    run = checks([PARAM], [PARAM], kind="parameters")
    for to_come, is_said in ((0.0, True), (0.1, True), (0.2, False)):
        run.checks[:] = [replace(check, rate_to_come=to_come) for check in run.checks]
        assert (lost_updates(run) is not None) == is_said


@pytest.mark.parametrize("share, rates, loss, is_said", [
    (0.6, [0.1, 0.1, 0.1], None, True),  # from the first step on, and nothing is known yet
    (0.6, [0.1, 0.1, 0.1], 0.5, False),  # it learns all the same
    (0.6, [0.1, 0.1, 0.1], 2.0, True),
    (0.6, [0.01, 0.1, 0.1], None, False),  # behind a warm-up updates are of averaged gradients
    (0.6, [0.01, 0.1, 0.1], 0.5, False),
    (0.6, [0.01, 0.1, 0.1], 2.0, True),
    (0.95, [0.01, 0.1, 0.1], None, True),  # hardly any weight is trained
    (0.95, [0.1, 0.1, 0.1], 0.5, True),
    (0.5, [0.1, 0.1, 0.1], 2.0, False),
])  # fmt: skip
def test_lost_updates_are_an_error_where_they_cost_something(share, rates, loss, is_said):
    run = checks(*[[replace(PARAM, lost=share)]] * 3, rates=rates, kind="parameters")
    if loss is not None:  # half of a run of 200 steps; a constant prediction has a loss of 2.3
        called = LossSeen("cross_entropy", None, 10, True, False, "", 0.0, math.nan, math.nan, 0.5, loss, 2.3)
        run.checks[:] = [replace(check, losses=(called,)) for check in run.checks]
        run.steps, run.steps_planned = 100, 200
        for _ in range(100):
            run.losses.append(loss)
    verdict = lost_updates(run)
    assert (verdict is not None) == is_said and (verdict is None or not is_exact(verdict))  # it may be withdrawn


def symmetric(rows, step=4):
    return symmetric_init(RunSeen(checks=[Check(step, 0.1, rows=(rows,))]))


def test_symmetric_init_needs_units_that_stay_equal():
    assert symmetric(ROWS).layer == "net"
    assert symmetric(replace(ROWS, name="prompt", layer="")).layer == "prompt"  # of the LightningModule itself
    assert symmetric(ROWS, step=3) is None
    assert symmetric(replace(ROWS, spread=4e-4)).confidence == 1.0  # rounding
    assert symmetric(replace(ROWS, spread=6e-4)) is None
    assert symmetric(replace(ROWS, moved=0.0)) is not None  # all zero, for good
    assert symmetric(replace(ROWS, moved=0.0, has_gradient=False)) is None


@pytest.mark.parametrize("module", [DROPOUT, NORM])
def test_wrong_mode_needs_three_steps_in_which_all_of_a_kind_are_off(module):
    on = replace(module, is_training=True, is_fresh=False)
    assert wrong_mode(checks([module], [module], [module], kind="modules")).layer == module.name
    assert is_exact(wrong_mode(checks([module], [module], [module], kind="modules")))
    assert not is_exact(wrong_mode(checks([module], [module], kind="modules")))
    assert wrong_mode(checks([on], [module], [module], kind="modules")) is None
    assert wrong_mode(checks([module], [on], [module], kind="modules")) is None
    assert wrong_mode(checks(*[[module, on]] * 3, kind="modules")) is None
    assert wrong_mode(checks(*[[replace(module, acts=False)]] * 3, kind="modules")) is None
    assert wrong_mode(checks(*[[replace(module, is_trained=False)]] * 3, kind="modules")) is None
    assert wrong_mode(checks([on], *[[module]] * 3, kind="modules")).onset_step == 1


def test_wrong_mode_names_all_kinds_and_begins_where_the_last_spell_does():
    run = checks([DROPOUT], [replace(DROPOUT, is_training=True)], *[[DROPOUT, NORM]] * 3, kind="modules")
    verdict = wrong_mode(run)
    assert (verdict.layer, verdict.onset_step) == ("net.drop", 2) and "on_train_batch_start" in verdict.remedy
    assert "drops nothing and batch norm uses running statistics that were never" in verdict.cause
    assert "the dropout layer net.drop and the batch norm layer net.norm that" in verdict.evidence
    old, other = replace(NORM, is_fresh=False), replace(NORM, is_training=True, is_fresh=False)
    verdict = wrong_mode(checks(*[[DROPOUT, DROPOUT, old, other]] * 3, kind="modules"))
    assert "as they are" in verdict.cause and "on_train_start" in verdict.remedy
    assert "all 2 dropout layers and 1 of 2 batch norm layers" in verdict.evidence


def test_a_batch_norm_that_was_frozen_with_statistics_is_let_be():
    assert wrong_mode(checks(*[[replace(NORM, is_fresh=False)]] * 3, kind="modules")) is None


def negated(losses, values=(2.4, 2.5, 2.6)):
    nan = float("nan")
    called = LossSeen("cross_entropy", None, 10, True, False, "(8, 10) and (8,)", 0.0, nan, nan, 0.5, nan, 2.3)
    kept = Losses()
    for loss in losses:
        kept.append(loss)
    made = [
        Check(step, 0.1, losses=(replace(called, value=value),), returned=losses[step])
        for step, value in enumerate(values)
    ]
    return loss_does_not_match_output(RunSeen(steps=len(losses), losses=kept, checks=made))


def test_a_loss_of_torch_times_minus_one_that_falls():
    verdict = negated([-2.4, -2.5, -2.6, -5.1, -5.2, -5.3])
    assert "times -1" in verdict.cause and "F.cross_entropy gave 2.4 where the loss was -2.4" in verdict.evidence
    assert negated([-2.4, -2.5, -2.6, -3.0, -3.0, -3.0]) is None  # the noise of batches
    assert negated([-2.4, -2.5, -2.6, -1.0, -1.0, -1.0]) is None  # an optimizer that maximizes
    assert negated([-2.4, -2.5, -2.2, -5.1, -5.2, -5.3]) is None  # another term, in one step
    assert negated([2.4, 2.5, 2.6, 5.1, 5.2, 5.3]) is None
    assert negated([-2.4, -2.5, -5.1, -5.2, -5.3], values=(2.4, 2.5)) is None


def schedule(**changes):
    return schedule_fault(RunSeen(schedules=[replace(SCHEDULE, **changes)]))


def test_a_schedule_that_fits_is_let_be():
    assert schedule() is None
    assert schedule(interval="epoch", length=10, calls=5) is None
    assert schedule(length=40) is None and schedule(length=None) is None
    assert schedule(interval="epoch", length=10, calls=5, epochs_planned=100, steps_planned=200) is None


def test_a_length_in_the_other_unit():
    assert "once an epoch" in schedule(interval="epoch", length=100, calls=5).cause
    assert "goes up and down" in schedule(length=10).cause
    assert "has ended" in schedule(length=10, returns=False).cause
    assert schedule(length=10, frequency=2, calls=25) is None
    assert schedule(length=10, steps_planned=None) is None


def test_a_scheduler_stepped_twice_or_never():
    assert "by the module and by Lightning" in schedule(calls=100).cause
    assert schedule(calls=51) is None and schedule(calls=100, follows_metric=True) is None
    assert schedule(calls=7, steps=1) is None
    at_once = dict(calls=2, steps=1, batches=1)
    assert schedule(**at_once, batches_twice=1).confidence == ONCE and schedule(**at_once) is None
    assert schedule(calls=3, steps=2, batches=2, batches_twice=1) is None  # once by hand
    assert schedule(calls=2, steps=1, batches=1, batches_twice=1, interval="epoch", length=10) is None
    assert schedule(calls=100, batches=50, batches_twice=50).confidence == 1.0
    assert "neither does it" in schedule(interval="manual", calls=0).cause
    assert schedule(interval="manual", calls=1) is None and schedule(interval="manual", calls=0, epochs=1) is None


def test_a_rate_of_zero():
    assert "the learning rate is 0" in schedule(name="", zero_first=50, zero_last=50).cause
    assert "starts at 0" in schedule(interval="epoch", length=None, calls=0, zero_first=50).cause
    assert schedule(zero_first=1) is None and schedule(zero_first=7, steps=7, calls=7) is None
    verdict = schedule(zero_last=20)
    assert "ends long before" in verdict.cause and verdict.onset_step == 30
    assert schedule(steps=95, calls=95, zero_last=20) is None
    assert schedule(zero_last=7) is None


def test_a_rate_that_has_faded_in_the_first_quarter():
    parts = dict(name="ExponentialLR", length=None, steps=200, calls=200, steps_planned=400)
    verdict = schedule(**parts, faded=160)
    assert "at every step" in verdict.cause and verdict.onset_step == 40 and '"interval": "epoch"' in verdict.remedy
    assert schedule(**parts, faded=99) is None  # a rate that fell in the second quarter
    assert schedule(**{**parts, "steps": 199}, faded=160) is None  # it may go up again: before the half
    short = {**parts, "steps": 40, "calls": 40, "steps_planned": 40}
    assert schedule(**short, faded=32) is not None and schedule(**short, faded=31) is None  # a run of a few steps
    assert schedule(**{**parts, "steps_planned": 801}, faded=160) is None  # ended early
    for changes in (
        dict(interval="epoch", calls=5),
        dict(follows_metric=True),
        dict(name=""),
        dict(steps_planned=None),
    ):
        assert schedule(**{**parts, **changes}, faded=160) is None
    by_hand = schedule(**{**parts, "interval": "manual"}, faded=160)
    assert by_hand.remedy.startswith("scheduler.step() in on_train_epoch_end")
    assert schedule(**{**parts, "interval": "manual", "calls": 10}, faded=160) is None


def test_processes():
    assert ranks_diverge(RunSeen(ranks=[RanksSeen(3, differing=("a", "b"))])).layer == "a"
    assert "ranks 0, 1" in duplicate_data(RunSeen(ranks=[RanksSeen(3, same_batches=(0, 1), num_batches=3)])).evidence
    assert (
        ranks_diverge(RunSeen(ranks=[RanksSeen(3)])) is None and duplicate_data(RunSeen(ranks=[RanksSeen(3)])) is None
    )


@pytest.mark.parametrize("where", ["batch", "forward", "before", "loss", "gradient", "process"])
def test_nonfinite_says_what_came_first(where):
    seen = NonfiniteSeen(5, where, "net", "half of it is NaN", 1.0, False)
    assert nonfinite(RunSeen(nonfinite=seen)).evidence == "half of it is NaN"
    assert "diverged" in nonfinite(RunSeen(nonfinite=replace(seen, rise=1e4))).cause
    causes = {nonfinite(RunSeen(nonfinite=replace(seen, where=other))).cause for other in ("batch", "loss", where)}
    assert len(causes) == len({"batch", "loss", where})


def test_average_not_ready_gives_one_that_fits():
    seen = AverageSeen("EMA(0.999)", 1000.0, 160, 0.85, "EMA(decay=0.94)")
    verdict = average_not_ready(RunSeen(averages=[seen]))
    assert "EMA(decay=0.94)" in verdict.remedy and "85%" in verdict.evidence


def test_one_verdict_per_symptom_and_the_one_that_explains_the_others_first():
    run = RunSeen(
        not_zeroed={"SGD": 1},
        nonfinite=NonfiniteSeen(5, "loss", None, "NaN", 100.0, False),
        averages=[AverageSeen("EMA(0.999)", 1000.0, 160, 0.85, "EMA(0.94)")],
    )
    found = diagnose(run)
    assert [verdict.symptom for verdict in found] == ["gradient_not_zeroed", "nonfinite", "average_not_ready"]
    assert ranked([*reversed(found), *found]) == found
