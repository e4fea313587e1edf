# SPDX-License-Identifier: Apache-2.0
"""Buffers beside an average of the weights: the model's own, averaged, or BatchNorm's statistics recomputed."""

import lightning.pytorch as pl
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
    hooks_of,
    resuming,
    whole_state,
)
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn, update_bn

from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.callbacks import WeightAveraging


@pytest.fixture
def normed(regression):
    """Regression with BatchNorm and dropout, frozen in part, and another buffer that counts its forward passes."""

    class Normed(regression):
        def __init__(self, configure=adamw, dropout=0.0):
            super().__init__(configure)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.net = nn.Sequential(
                    nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.3), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2)
                )
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.calls += self.training
            return self.net(x)

        def loss(self, batch):
            return nn.functional.mse_loss(self(batch[0]), batch[1])

    return Normed


STATISTICS = ("net.1.running_mean", "net.1.running_var")


@folded_and_own
def test_buffers_of_floats_are_averaged_on_request_and_integers_copied(normed, fit, path):
    """Against torch's AveragedModel(use_buffers=True), which truncates what it averages of integers."""
    trace, module = Trace(whole_state), normed()
    average = WeightAveraging(SWA(2), average_buffers=True)
    fit(module, *fuse(path), average, trace, limit_val_batches=1.0, epochs=3)
    states = list(trace.trained.values())
    for name in STATISTICS:
        expected = torch.stack([state[name] for state in states[1:]]).mean(0)
        assert_equal(whole_state(module)[name], expected, TOLERANCE)
        assert_equal(trace.validated[4][-1][name], torch.stack([s[name] for s in states[1:4]]).mean(0), TOLERANCE)
    assert module.net[1].num_batches_tracked == 12
    reference, averaged = normed(), None
    for state in states[1:]:
        reference.load_state_dict(state)
        averaged = averaged or AveragedModel(reference, avg_fn=get_swa_avg_fn(), use_buffers=True)
        averaged.update_parameters(reference)
    assert_equal(whole_state(module)[STATISTICS[0]], averaged.module.state_dict()[STATISTICS[0]], TOLERANCE)
    assert averaged.module.net[1].num_batches_tracked != 12  # the defect


@folded_and_own
def test_a_skipped_step_averages_no_buffers(normed, fit, path):
    """torch's fused optimizers are stepped even then, and skip by themselves."""
    trace = Trace(whole_state)
    module = normed(lambda module: torch.optim.AdamW(module.parameters(), lr=0.05, fused=True))
    module.poisoned = [(1, 0)]  # of the third step
    average = WeightAveraging(EMA(0.5), average_buffers=True)
    fit(module, *fuse(path), average, trace, precision="16-mixed")
    done = [{n: state[n] for n in STATISTICS} for step, state in trace.trained.items() if step != 3]
    assert_equal({n: whole_state(module)[n] for n in STATISTICS}, ema(done, 0.5), TOLERANCE)


@resuming
@folded_and_own
@pytest.mark.parametrize("option", ["average_buffers", "update_bn"])
def test_buffers_resume(normed, fit, tmp_path, path, option):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, resumed, kwargs = normed(), normed(), {option: True}
    arguments = dict(epochs=4, limit_val_batches=1.0)
    fit(whole, *fuse(path), WeightAveraging(LAWA(3), **kwargs), keep, enable_checkpointing=True, **arguments)
    fit(resumed, *fuse(path), WeightAveraging(LAWA(3), **kwargs), ckpt_path=tmp_path / "epoch=1.ckpt", **arguments)
    assert_equal(whole_state(resumed), whole_state(whole))


@resuming
@folded_and_own
@pytest.mark.parametrize("option", ["average_buffers", "update_bn"])
def test_a_finished_run_that_is_started_again_has_the_same_buffers(normed, fit, tmp_path, path, option):
    first, again = normed(), normed()
    callbacks = [*fuse(path), WeightAveraging(EMA(0.9), **{option: True})]
    fit(first, *callbacks).save_checkpoint(tmp_path / "end.ckpt")
    fit(again, *callbacks, ckpt_path=tmp_path / "end.ckpt")
    assert_equal(whole_state(again), whole_state(first))


def torchs_statistics(module, state, data):
    """What torch's update_bn finds for the weights of `state`."""
    module.load_state_dict(state)
    update_bn(data(), module)
    return {name: module.state_dict()[name] for name in STATISTICS}


@folded_and_own
@pytest.mark.parametrize("val_check_interval", [1.0, 3])
def test_batch_norm_has_the_statistics_of_the_average(normed, fit, data, tmp_path, path, val_check_interval):
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)
    trace, module = Trace(whole_state), normed()
    arguments = dict(limit_val_batches=1.0, val_check_interval=val_check_interval, enable_checkpointing=True)
    fit(module, *fuse(path), WeightAveraging(SWA(2), update_bn=True), trace, keep, **arguments)
    for step, (*_, seen) in trace.validated.items():
        if step >= 2:
            expected = torchs_statistics(normed(), seen, data)
            assert_equal({name: seen[name] for name in STATISTICS}, expected, TOLERANCE)
            checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
            assert_equal({name: checkpoint["state_dict"][name] for name in STATISTICS}, expected, TOLERANCE)
            trained = trace.trained[step]
            if val_check_interval == 1.0:
                assert_equal(
                    {n: checkpoint["current_model_state"][n] for n in STATISTICS}, {n: trained[n] for n in STATISTICS}
                )
    expected = torchs_statistics(normed(), whole_state(module), data)
    assert_equal({name: whole_state(module)[name] for name in STATISTICS}, expected, TOLERANCE)
    assert module.calls == 12  # the passes that recompute them are not counted


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@folded_and_own
def test_recomputing_statistics_changes_nothing_of_the_training(normed, fit, path, dropout):
    traces = Trace(whole_state), Trace(whole_state)
    for trace, update in zip(traces, (False, True), strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            module = normed(dropout=dropout)
            module.net[0].eval()
            fit(module, *fuse(path), WeightAveraging(SWA(2), update_bn=update), trace, limit_val_batches=1.0)
            assert not module.net[0].training
    assert_equal(traces[0].trained, traces[1].trained)


def test_statistics_are_recomputed_once_for_each_average(normed, fit, tmp_path, monkeypatch):
    from lightning_optkit.callbacks.seams import batch_norm

    counted = []
    monkeypatch.setattr(batch_norm, "update_bn", lambda *args: counted.append(1) or update_bn(*args))
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(normed(), WeightAveraging(EMA(0.5), update_bn=True), keep, limit_val_batches=1.0, enable_checkpointing=True)
    assert len(counted) == 3
    counted.clear()
    weights_only = ModelCheckpoint(tmp_path / "w", save_top_k=-1, filename="{epoch}", save_weights_only=True)
    fit(normed(), WeightAveraging(EMA(0.5), update_bn=True), weights_only, enable_checkpointing=True)
    assert len(counted) == 3


def test_in_bf16_mixed(normed, fit):
    module = normed()
    fit(module, WeightAveraging(EMA(0.5), update_bn=True), precision="bf16-mixed", limit_val_batches=1.0)
    assert module.net[1].num_batches_tracked == 4


class TwoInputs(pl.LightningModule):
    """Its forward takes what `signature` says."""

    def __init__(self, normed, forward):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)) if normed else nn.Linear(4, 2)
        self.forward = forward.__get__(self)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


FORWARDS = {
    "two": (lambda self, x, mask: self.net(x), False),
    "keyword": (lambda self, *, x: self.net(x), False),
    "none": (lambda self: None, False),
    "default": (lambda self, x, mask=None: self.net(x), True),
    "any": (lambda self, *args: self.net(args[0]), True),
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("normed", [False, True])
def test_update_bn_asks_when_the_fit_starts_for_a_forward_that_it_can_call(make_trainer, data, normed, name):
    forward, fits = FORWARDS[name]
    module, trainer = TwoInputs(normed, forward), make_trainer(WeightAveraging(SWA(1), update_bn=True))
    if fits or not normed:  # without BatchNorm nobody calls it
        trainer.fit(module, data())
        return
    message = (
        r"^WeightAveraging\(update_bn=True\): TwoInputs\.forward\(.*\) must do with the first item of a batch alone"
    )
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, data())
    assert trainer.global_step == 0


def test_update_bn_needs_a_forward_and_one_loader(normed, make_trainer, data):
    class Without(normed):
        forward = pl.LightningModule.forward

    with pytest.raises(ValueError, match=r"^WeightAveraging\(update_bn=True\): Without must define forward\(x\)"):
        make_trainer(WeightAveraging(EMA(), update_bn=True)).fit(Without(), data(), data())

    class TwoLoaders(normed):
        def training_step(self, batch, batch_idx):
            return self.loss(batch[0])

    with pytest.raises(
        ValueError, match=r"^WeightAveraging\(update_bn=True\): the training data must be one DataLoader"
    ):
        make_trainer(WeightAveraging(EMA(), update_bn=True)).fit(TwoLoaders(), [data(), data()], data())


@folded_and_own
@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_train_batch_end", "on_train_end"])
def test_an_exception_anywhere_leaves_the_module_as_training_left_it(normed, fit, path, hook):
    trace, module = Trace(whole_state), normed()

    def fail(trainer, *_):
        if trainer.global_step >= 4:
            raise RuntimeError("stop")

    callbacks = [WeightAveraging(SWA(1), update_bn=True, average_buffers=True), trace, LambdaCallback(**{hook: fail})]
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, *fuse(path), *callbacks, limit_val_batches=1.0)
    assert_equal(whole_state(module), trace.trained[max(trace.trained)])
    assert "on_save_checkpoint" not in vars(module)
    assert not hooks_of(module.trainer.optimizers[0])
