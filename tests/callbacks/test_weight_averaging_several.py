# SPDX-License-Identifier: Apache-2.0
"""SWA and LAWA by callback, several averages in one run, weights-only files, and buffers."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn, update_bn

from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.callbacks import Fuse, WeightAveraging
from lightning_optkit.optimizers import SGD, AdamW

PATHS = ["folded", "own pass"]
TOLERANCE = 1e-6  # six steps on numbers of size 1 in fp32

folded_and_own = pytest.mark.parametrize("path", PATHS)
resuming = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*ModelCheckpoint")


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.05)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def whole_state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal(actual, expected, tolerance=0.0):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


class Trace(Callback):
    """State dicts: trained, after every optimizer step; and as validation sees them."""

    def __init__(self):
        self.trained, self.validated, self.last_step = {}, {}, 0

    def on_train_start(self, trainer, pl_module):
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > self.last_step:
            self.last_step = trainer.global_step
            self.trained[self.last_step] = whole_state(pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated[trainer.global_step] = whole_state(pl_module)


def mean(states):
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def ema(states, decay):
    current = states[0]
    for state in states[1:]:
        current = {name: value + (1 - decay) * (state[name] - value) for name, value in current.items()}
    return current


EXPECTED = {  # of the states after the steps of the run so far
    SWA(2): lambda states: mean(states[1:]),
    SWA(0.5): lambda states: mean(states[2:]),
    SWA(3, every=2): lambda states: mean(states[2::2]),
    LAWA(2): lambda states: mean(states[-2:]),
    LAWA(2, every=2, start=2): lambda states: mean(states[1::2][-2:]),
}


def fuse(path):
    return [Fuse(verbose=False)] if path == "folded" else []


@folded_and_own
@pytest.mark.parametrize("configure", [adamw, sgd])
@pytest.mark.parametrize("average", EXPECTED, ids=str)
def test_who_sees_the_average(regression, fit, path, configure, average):
    trace, module = Trace(), regression(configure)
    fit(module, *fuse(path), WeightAveraging(average), trace, limit_val_batches=1.0)
    states = list(trace.trained.values())
    first = 3 if average == SWA(0.5) else average.start
    for step in (2, 4, 6):
        expected = EXPECTED[average](states[:step]) if step >= first else states[step - 1]
        assert_equal(trace.validated[step], expected, TOLERANCE)
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
    trace, module, callbacks = Trace(), regression(adamw), several()
    fit(module, *fuse(path), *callbacks, trace, limit_val_batches=1.0)
    states = list(trace.trained.values())
    expected = [ema(states, 0.5), ema(states, 0.9), mean(states[1:]), mean(states[-2:]), mean(states[-3:])]
    for callback, average in zip(callbacks, expected, strict=True):
        assert_equal(callback.averaged_parameters(module), average, TOLERANCE)
    assert_equal(whole_state(module), expected[1], TOLERANCE)
    assert_equal(trace.validated[4], ema(states[:4], 0.9), TOLERANCE)
    plain = Trace()
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
    with pytest.raises(ValueError, match=r"^WeightAveraging\(LAWA\(k=3.*in the checkpoint its state is 'lawa_5', here"):
        fit(regression(adamw), *fuse(path), *several()[::-1], epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")


@resuming
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*WeightAveraging")
def test_a_one_pass_optimizer_leaves_behind_what_other_averages_kept(regression, fit, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(regression(adamw), Fuse(verbose=False), *several(), keep, epochs=4, enable_checkpointing=True)
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
    trace, module = Trace(), cls(adamw)
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


# --- buffers ---


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
    trace, module = Trace(), normed()
    average = WeightAveraging(SWA(2), average_buffers=True)
    fit(module, *fuse(path), average, trace, limit_val_batches=1.0, epochs=3)
    states = list(trace.trained.values())
    for name in STATISTICS:
        expected = torch.stack([state[name] for state in states[1:]]).mean(0)
        assert_equal(whole_state(module)[name], expected, TOLERANCE)
        assert_equal(trace.validated[4][name], torch.stack([s[name] for s in states[1:4]]).mean(0), TOLERANCE)
    assert module.net[1].num_batches_tracked == 12
    reference, averaged = normed(), None
    for state in states[1:]:
        reference.load_state_dict(state)
        averaged = averaged or AveragedModel(reference, avg_fn=get_swa_avg_fn(), use_buffers=True)
        averaged.update_parameters(reference)
    assert_equal(whole_state(module)[STATISTICS[0]], averaged.module.state_dict()[STATISTICS[0]], TOLERANCE)
    assert averaged.module.net[1].num_batches_tracked != 12  # the defect


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


def torchs_statistics(module, state, data):
    """What torch's update_bn finds for the weights of `state`."""
    module.load_state_dict(state)
    update_bn(data(), module)
    return {name: module.state_dict()[name] for name in STATISTICS}


@folded_and_own
@pytest.mark.parametrize("val_check_interval", [1.0, 3])
def test_batch_norm_has_the_statistics_of_the_average(normed, fit, data, tmp_path, path, val_check_interval):
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)
    trace, module = Trace(), normed()
    arguments = dict(limit_val_batches=1.0, val_check_interval=val_check_interval, enable_checkpointing=True)
    fit(module, *fuse(path), WeightAveraging(SWA(2), update_bn=True), trace, keep, **arguments)
    for step, seen in trace.validated.items():
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
    traces = Trace(), Trace()
    for trace, update in zip(traces, (False, True), strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            module = normed(dropout=dropout)
            module.net[0].eval()
            fit(module, *fuse(path), WeightAveraging(SWA(2), update_bn=update), trace, limit_val_batches=1.0)
            assert not module.net[0].training
    assert_equal(traces[0].trained, traces[1].trained)


def test_statistics_are_recomputed_once_for_each_average(normed, fit, tmp_path, monkeypatch):
    from lightning_optkit.callbacks import _batch_norm

    counted = []
    monkeypatch.setattr(_batch_norm, "update_bn", lambda *args: counted.append(1) or update_bn(*args))
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


def test_update_bn_needs_a_forward_and_one_loader(regression, normed, make_trainer, data):
    class Without(regression):
        forward = pl.LightningModule.forward

    with pytest.raises(ValueError, match=r"^WeightAveraging\(update_bn=True\): Without must define forward\(x\)"):
        make_trainer(WeightAveraging(EMA(), update_bn=True)).fit(Without(adamw), data(), data())

    class TwoLoaders(normed):
        def training_step(self, batch, batch_idx):
            return self.loss(batch[0])

    with pytest.raises(
        ValueError, match=r"^WeightAveraging\(update_bn=True\): the training data must be one DataLoader"
    ):
        make_trainer(WeightAveraging(EMA(), update_bn=True)).fit(TwoLoaders(), [data(), data()], data())


def test_a_strategy_that_hides_the_parameters_is_refused(regression):
    class Trainer:
        strategy = FSDPStrategy()
        callbacks = ()

    with pytest.raises(ValueError, match=r"strategy FSDPStrategy hides the parameters; use ModelParallelStrategy"):
        WeightAveraging(EMA()).setup(Trainer(), regression(adamw), "fit")


@folded_and_own
@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_train_batch_end", "on_train_end"])
def test_an_exception_anywhere_leaves_the_module_as_training_left_it(normed, fit, path, hook):
    trace, module = Trace(), normed()

    def fail(trainer, *_):
        if trainer.global_step >= 4:
            raise RuntimeError("stop")

    callbacks = [WeightAveraging(SWA(1), update_bn=True, average_buffers=True), trace, LambdaCallback(**{hook: fail})]
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, *fuse(path), *callbacks, limit_val_batches=1.0)
    assert_equal(whole_state(module), trace.trained[max(trace.trained)])
    assert "on_save_checkpoint" not in vars(module)
    optimizer = module.trainer.optimizers[0]
    assert not [h for n, hooks in vars(optimizer).items() if n.endswith("_hooks") for h in hooks]
