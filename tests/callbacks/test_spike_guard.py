# SPDX-License-Identifier: Apache-2.0
"""SpikeGuard: a healthy run is the one without it, a bad batch is dropped or shrunk, and what is refused and said."""

import copy
import logging
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from spike_guard_cases import LR, Broken, Net, equal, fit, frozen, guard, same

from lightning_optkit.averaging import EMA, SWA
from lightning_optkit.callbacks import (
    ExactAccumulation,
    Fuse,
    GradientClipping,
    Grokfast,
    LabelSmoothing,
    Lookahead,
    LookSAM,
    LRSchedule,
    ScheduleFreeWrapper,
    SpikeGuard,
    WeightAveraging,
)
from lightning_optkit.clipping import AutoClip, ClipNorm
from lightning_optkit.diagnostics import SpikeEvent
from lightning_optkit.schedules import cosine

PRECISIONS = {
    "32": {},
    "bf16": {"precision": "bf16-mixed"},
    "fp16": {"plugins": lambda: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))]},
}

STRATEGIES = {
    "alone": list,
    "Fuse": lambda: [Fuse(verbose=False), GradientClipping(AutoClip(90)), WeightAveraging(EMA(0.9))],
    "own passes": lambda: [GradientClipping(ClipNorm(1.0)), WeightAveraging(SWA(10)), LabelSmoothing(0.1)],
    "accumulation": lambda: [ExactAccumulation()],
    "schedule": lambda: [LRSchedule(cosine())],
}


def precision_of(name):
    return {key: value() if callable(value) else value for key, value in PRECISIONS[name].items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_healthy_run_is_the_one_without_it(name, precision):
    more = {"accumulate_grad_batches": 2} if name == "accumulation" else {}
    guarded = guard(warmup=20)
    fit(module := Net(), guarded, *STRATEGIES[name](), **more, **precision_of(precision), steps=100)
    fit(plain := Net(), *STRATEGIES[name](), **more, **precision_of(precision), steps=100)
    assert same(module, plain) and not guarded.events and module.rates == plain.rates


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("bad", ["x100", "nan"])
@pytest.mark.parametrize("name", ["alone", "Fuse", "own passes"])
def test_a_dropped_batch_is_as_one_without_a_loss(name, bad):
    """Nothing is left of it, in running statistics, moments, averages and histories of clips either."""
    dropped, without = Net({120: bad}), Net({120: "none"})
    dropped.net[3].p = without.net[3].p = 0.0  # a batch without a loss draws no mask
    fit(dropped, guarded := guard(), *STRATEGIES[name]())
    fit(without, *STRATEGIES[name]())
    assert [(event.step, event.action) for event in guarded.events] == [(120, "skip")]
    assert same(dropped, without) and len(dropped.losses) == len(without.losses) + 1


@pytest.mark.parametrize("name", ["torch", "torch, fused", "Fuse"])
def test_dropped_under_a_loss_scaler(name):
    fused = name == "torch, fused" or None
    module = Net({100: "x100"}, lambda m: torch.optim.AdamW(m.parameters(), LR, fused=fused))
    fuse = [Fuse(verbose=False), GradientClipping(ClipNorm(1.0))] if name == "Fuse" else []
    trainer = fit(module, guarded := guard(), *fuse, **precision_of("fp16"), steps=110)
    assert [(event.step, event.action) for event in guarded.events] == [(100, "skip")]
    assert trainer.global_step == 110 and trainer.optimizers[0].state[module.net[0].weight]["step"] == 109


@pytest.mark.parametrize("name", ["torch, fused", "Fuse"])
def test_a_loss_that_is_not_finite_is_none_of_the_scalers(name):
    module = Net({100: "nan"}, lambda m: torch.optim.AdamW(m.parameters(), LR, fused=name == "torch, fused" or None))
    fuse = [Fuse(verbose=False)] if name == "Fuse" else []
    fit(module, guarded := guard(), *fuse, **precision_of("fp16"), steps=110)
    assert [(event.step, event.action) for event in guarded.events] == [(100, "skip")]
    with (
        pytest.raises(ValueError, match="of step 20 are nan and nan, and 21 in a row"),
        pytest.warns(UserWarning, match="SpikeGuard: step 2: loss nan"),
    ):
        fit(Net(dict.fromkeys(range(160), "nan")), guard(), *fuse, **precision_of("fp16"), steps=30)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_accumulated_batches_are_dropped_together():
    windows = [batch // 20 * 7 + batch % 20 // 3 for batch in range(240)]  # 20 batches an epoch, in threes
    guarded = guard(warmup=30)
    fit(module := Net({131: "x100"}), guarded, accumulate_grad_batches=3, steps=80)
    assert [(event.step, event.action) for event in guarded.events] == [(windows[131], "skip")]
    others = {batch: "none" for batch in range(240) if windows[batch] == windows[131]}
    without = Net(others)
    module.net[3].p = without.net[3].p = 0.0
    dropped = Net({131: "x100"})
    dropped.net[3].p = 0.0
    fit(dropped, guard(warmup=30), accumulate_grad_batches=3, steps=80)
    fit(without, accumulate_grad_batches=3, steps=80)
    assert same(dropped, without)


def test_shrunk():
    guarded = guard(action="shrink")
    fit(module := Net({120: "x100"}), guarded)
    (event,) = guarded.events
    assert event == SpikeEvent(120, "shrink", event.loss, event.norm) and event.loss > 5
    fit(skipped := Net({120: "x100"}), guard())
    assert not same(module, skipped)
    nan = guard(action="shrink")
    fit(Net({120: "nan"}), nan)
    assert [event.action for event in nan.events] == ["skip"]


@pytest.mark.parametrize(("since", "rollback"), [(0, True), (100, False)])
def test_a_run_that_takes_no_step_ends_with_an_error(since, rollback):
    bad = dict.fromkeys(range(since, 160), "nan")
    guarded, module = guard(rollback=rollback), Net(bad)
    before = frozen(module.state_dict())
    last = since + 20  # it is judged to be broken every third step
    said = rf"^SpikeGuard: loss and gradient norm of step {last} are nan and nan, and 21 in a row were not finite;"
    with (
        pytest.warns(UserWarning, match=f"SpikeGuard: step {since + 2}: loss nan"),
        pytest.raises(ValueError, match=said),
    ):
        fit(module, guarded)
    assert [event.step for event in guarded.events] == [*range(since, last + 1)]
    assert {event.action for event in guarded.events} == {"skip"}
    assert equal(frozen(module.state_dict()), before) == (since == 0)


@pytest.mark.filterwarnings("ignore:SpikeGuard. step")
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_short_run_that_takes_no_step_ends_with_an_error(steps):
    with pytest.raises(ValueError, match=f"of step {steps - 1} are nan and nan, and {steps} in a row"):
        fit(Net(dict.fromkeys(range(160), "nan")), guard(), steps=steps)


@pytest.mark.filterwarnings("ignore:SpikeGuard. step")
def test_a_run_that_begins_with_some_bad_batches_goes_on():
    guarded = guard()
    fit(module := Net(dict.fromkeys(range(18), "nan")), guarded, steps=60)
    fit(without := Net(dict.fromkeys(range(18), "nan")), guard(rollback=False), steps=60)
    assert len(guarded.events) == 18 and same(module, without)
    fit(Net({59: "nan"}), ended := guard(), steps=60)  # the last step alone
    assert len(ended.events) == 1


def test_pickled_and_copied_after_a_fit():
    guarded = guard()
    fit(Net({120: "x100"}), guarded)
    for copied in (pickle.loads(pickle.dumps(guarded)), copy.deepcopy(guarded)):
        assert copied.events == guarded.events and equal(copied.state_dict(), guarded.state_dict())


def test_two_fits():
    guarded = guard()
    fit(Net({120: "x100"}), guarded)
    fit(Net(), guarded)
    assert not guarded.events


def test_what_it_says(caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(Net({90: "x100"}), guarded := guard(verbose=True), Broken({110}))
    texts = [text for text in caplog.messages if text.startswith("SpikeGuard: ")]
    assert len(texts) == len(guarded.events)
    assert texts[0].startswith("SpikeGuard: step 90: loss ") and texts[0].endswith("are usual: the batch is dropped.")
    back_to = guarded.events[-1].back_to
    assert texts[-1].endswith(
        f"the losses stay too high: back to the state before step {back_to}, and to the rate in 5 steps."
    )


class Manual(Net):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (Manual, lambda: [guard()], "optimizes manually"),
        (Net, lambda: [guard(), Lookahead()], "Lookahead keeps weights or gradients of its own"),
        (Net, lambda: [guard(), Grokfast()], "Grokfast keeps"),
        (Net, lambda: [guard(), LookSAM()], "LookSAM keeps"),
        (Net, lambda: [guard(), ScheduleFreeWrapper()], "ScheduleFreeWrapper keeps"),
        (
            Net,
            lambda: [guard(), StochasticWeightAveraging(0.1)],
            "StochasticWeightAveraging keeps .* ok.WeightAveraging",
        ),
        (Net, lambda: [guard(), EMAWeightAveraging()], "EMAWeightAveraging keeps"),
        (lambda: Net(configure=lambda m: torch.optim.LBFGS(m.parameters())), lambda: [guard()], "LBFGS evaluates"),
    ],
    ids=["manual", "Lookahead", "Grokfast", "LookSAM", "ScheduleFreeWrapper", "SWA", "EMA", "LBFGS"],
)
def test_refused(module, callbacks, message):
    with pytest.raises(ValueError, match=rf"^SpikeGuard\(.*{message}"):
        fit(module(), *callbacks())


def test_beside_lookahead_without_rollback():
    fit(Net({120: "x100"}), guarded := guard(rollback=False), Lookahead())
    assert [event.action for event in guarded.events] == ["skip"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"action": "clip"}, {"rollback": 1}, {"patience": 0}, {"every": 0}, {"rewarm": -1}, {"max_rollbacks": 0},
        {"threshold": 0.0}, {"window": 3}, {"warmup": 1}, {"verbose": None},
    ],
    ids=lambda arguments: next(iter(arguments)),
)  # fmt: skip
def test_wrong_arguments(arguments):
    with pytest.raises((TypeError, ValueError), match=rf"^SpikeGuard\({next(iter(arguments))}="):
        SpikeGuard(**arguments)
