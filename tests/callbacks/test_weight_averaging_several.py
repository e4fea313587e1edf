# SPDX-License-Identifier: Apache-2.0
"""SWA and LAWA by callback, several averages in one run, and weights-only files."""

import pytest
import torch
from average_cases import (
    TOLERANCE,
    Trace,
    adamw,
    assert_equal,
    ema,
    folded_and_own,
    fuse,
    mean,
    resuming,
    sgd,
    whole_state,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy

from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.callbacks import Fuse, WeightAveraging
from lightning_optkit.optimizers import SGD, AdamW

EXPECTED = {  # of the states after the steps of the run so far
    SWA(2): lambda states: mean(states[1:]),
    SWA(0.5): lambda states: mean(states[2:]),
    SWA(3, every=2): lambda states: mean(states[2::2]),
    LAWA(2): lambda states: mean(states[-2:]),
    LAWA(2, every=2, start=2): lambda states: mean(states[1::2][-2:]),
}


@folded_and_own
@pytest.mark.parametrize("configure", [adamw, sgd])
@pytest.mark.parametrize("average", EXPECTED, ids=str)
def test_who_sees_the_average(regression, fit, path, configure, average):
    trace, module = Trace(whole_state), regression(configure)
    fit(module, *fuse(path), WeightAveraging(average), trace, limit_val_batches=1.0)
    states = list(trace.trained.values())
    first = 3 if average == SWA(0.5) else average.start
    for step in (2, 4, 6):
        expected = EXPECTED[average](states[:step]) if step >= first else states[step - 1]
        assert_equal(trace.validated[step][-1], expected, TOLERANCE)
    assert_equal(whole_state(module), EXPECTED[average](states), TOLERANCE)


@resuming
@folded_and_own
@pytest.mark.parametrize("average", [SWA(0.25, every=3), LAWA(3, every=2)], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_resumed_equals_uninterrupted_bit_for_bit(regression, fit, tmp_path, path, average, precision):
    whole, resumed = regression(sgd), regression(sgd)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    arguments = dict(epochs=4, precision=precision, limit_val_batches=1.0)
    fit(whole, *fuse(path), WeightAveraging(average), keep, enable_checkpointing=True, **arguments)
    fit(resumed, *fuse(path), WeightAveraging(average), ckpt_path=tmp_path / "epoch=1.ckpt", **arguments)
    assert_equal(whole_state(resumed), whole_state(whole))


# --- several ---


def several():
    return [
        WeightAveraging(EMA(0.5), evaluate=False),
        WeightAveraging(EMA(0.9)),
        WeightAveraging(SWA(2), evaluate=False),
        WeightAveraging(LAWA(2), evaluate=False),
        WeightAveraging(LAWA(3), evaluate=False),
    ]


@folded_and_own
def test_several_averages_at_once(regression, fit, path):
    trace, module, callbacks = Trace(whole_state), regression(adamw), several()
    fit(module, *fuse(path), *callbacks, trace, limit_val_batches=1.0)
    states = list(trace.trained.values())
    expected = [ema(states, 0.5), ema(states, 0.9), mean(states[1:]), mean(states[-2:]), mean(states[-3:])]
    for callback, average in zip(callbacks, expected, strict=True):
        assert_equal(callback.averaged_parameters(module), average, TOLERANCE)
    assert_equal(whole_state(module), expected[1], TOLERANCE)
    assert_equal(trace.validated[4][-1], ema(states[:4], 0.9), TOLERANCE)
    plain = Trace(whole_state)
    fit(regression(adamw), *fuse(path), plain, limit_val_batches=1.0)
    assert_equal(trace.trained, plain.trained)


def test_the_step_keeps_one_of_them_and_each_says_how_it_is_kept(regression, fit):
    callbacks = several()
    trainer = fit(regression(adamw), Fuse(verbose=False), *callbacks)
    folded, second, third, lawa, lawa_2 = [callback.explain() for callback in callbacks]
    assert folded == "EMA(decay=0.5, start=1, every=1): folded into the step of AdamW, as state 'ema'."
    assert "a pass of its own (the step keeps another average) after the step of AdamW, as state 'ema_2'" in second
    assert "as state 'swa_3'" in third
    assert "a pass of its own (no step keeps snapshots) after the step of AdamW, as state 'lawa'" in lawa
    assert "as state 'lawa_5'" in lawa_2
    state = next(iter(trainer.optimizers[0].state.values()))
    assert {"ema", "ema_2", "swa_3", "lawa_snapshot_0", "lawa_5_snapshot_2", "num_averaged_ema_2"} <= set(state)


@resuming
@folded_and_own
def test_several_averages_resume(regression, fit, tmp_path, path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, resumed, first, again = regression(adamw), regression(adamw), several(), several()
    fit(whole, *fuse(path), *first, keep, epochs=4, enable_checkpointing=True)
    fit(resumed, *fuse(path), *again, epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    for before, after in zip(first, again, strict=True):
        assert_equal(after.averaged_parameters(resumed), before.averaged_parameters(whole))
    assert_equal(whole_state(resumed), whole_state(whole))


@resuming
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*WeightAveraging")
def test_a_one_pass_optimizer_leaves_behind_what_other_averages_kept(regression, fit, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(regression(adamw), Fuse(verbose=False), *several(), keep, epochs=4, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="WeightAveraging: .* this run leaves it out"):
        trainer = fit(regression(adamw), Fuse(verbose=False), epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert not any("lawa" in name for state in trainer.optimizers[0].state.values() for name in state)


def test_an_optimizer_that_keeps_another_average_is_refused(regression, fit):
    with pytest.raises(ValueError, match=r"^WeightAveraging\(EMA\(decay=0\.5.*: AdamW keeps EMA\(decay=0\.9.* already"):
        fit(
            regression(lambda m: AdamW(m.parameters(), average=EMA(0.9))),
            WeightAveraging(EMA(0.5)),
        )


def test_after_the_fit_the_optimizer_keeps_what_it_kept(regression, fit):
    made = []

    def configure(module):
        made.append(SGD(module.parameters(), lr=0.1))
        return made[0]

    module = regression(configure)
    fit(module, *several())
    assert made[0].average is None
    assert "on_save_checkpoint" not in vars(module)


# --- files of weights only ---


class SavesItself:
    def on_save_checkpoint(self, checkpoint):
        checkpoint["told"] = True


@folded_and_own
@pytest.mark.parametrize("has_hook", [False, True])
def test_a_file_of_weights_only_exports_the_average(regression, fit, data, tmp_path, path, has_hook):
    """Lightning does not ask callbacks then (its own WeightAveraging exports the trained weights)."""
    cls = type("Module", (SavesItself, regression), {}) if has_hook else regression
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_weights_only=True)
    trace, module = Trace(whole_state), cls(adamw)
    callbacks = [*fuse(path), WeightAveraging(EMA(0.9, start=3)), trace, keep]
    trainer = fit(module, *callbacks, limit_val_batches=1.0, enable_checkpointing=True)
    states = list(trace.trained.values())
    for epoch, expected in ((0, states[1]), (1, ema(states[2:4], 0.9)), (2, ema(states[2:], 0.9))):
        checkpoint = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert_equal(dict(checkpoint["state_dict"]), expected, TOLERANCE)
        assert "optimizer_states" not in checkpoint
        assert checkpoint.get("told", False) == has_hook
    fresh = cls(adamw)
    trainer.test(fresh, data(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False)
    assert_equal(whole_state(fresh), ema(states[2:], 0.9), TOLERANCE)
    predicted = torch.cat(trainer.predict(cls(adamw), data(), ckpt_path=tmp_path / "epoch=2.ckpt"))
    expected = torch.cat([torch.func.functional_call(fresh, ema(states[2:], 0.9), (b[0],)) for b in data()])
    assert_equal(predicted, expected.detach(), TOLERANCE)


# --- what is refused ---


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(average=0.9), TypeError, r"WeightAveraging\(average=0\.9\): average must be one such as EMA\(0\.999\)\."),
        (dict(average=EMA(), evaluate=1), ValueError, r"WeightAveraging\(evaluate=1\): evaluate must be one of False"),
        (dict(average=EMA(), update_bn=None), ValueError, r"WeightAveraging\(update_bn=None\)"),
        (dict(average=EMA(), average_buffers=2), ValueError, r"WeightAveraging\(average_buffers=2\)"),
        (dict(average=EMA(), evaluate=False, update_bn=True), ValueError, r"evaluate must be True; nothing else uses"),
    ],
    ids=str,
)
def test_refuses_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        WeightAveraging(**kwargs)


def test_a_strategy_that_hides_the_parameters_is_refused(regression):
    class Trainer:
        strategy = FSDPStrategy()
        callbacks = ()

    with pytest.raises(ValueError, match=r"strategy FSDPStrategy hides the parameters; use ModelParallelStrategy"):
        WeightAveraging(EMA()).setup(Trainer(), regression(adamw), "fit")
