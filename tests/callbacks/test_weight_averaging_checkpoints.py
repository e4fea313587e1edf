# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run with WeightAveraging: their contents, and resuming from them."""

import pytest
import torch
from average_cases import (
    PATHS,
    TOLERANCE,
    Trace,
    adamw,
    assert_equal,
    averages,
    callbacks_of,
    folded_and_own,
    resuming,
    sgd,
    weights,
)
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import ExactResume, Fuse, WeightAveraging


def saved(fit, module, tmp_path, folder, *callbacks, epochs=4, **kwargs):
    """A run that keeps the checkpoint of every epoch."""
    keep = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
    trainer = fit(module, *callbacks, keep, epochs=epochs, enable_checkpointing=True, **kwargs)
    return trainer, tmp_path / folder / "epoch=1.ckpt"


@folded_and_own
@pytest.mark.parametrize("limit_val_batches", [0, 1.0])
def test_a_checkpoint_holds_the_average_and_beside_it_the_trained_weights(
    regression, fit, tmp_path, path, limit_val_batches
):
    trace, module = Trace(), regression(adamw)
    callbacks = callbacks_of(path, EMA(0.9), trace)
    trainer, file = saved(fit, module, tmp_path, "run", *callbacks, limit_val_batches=limit_val_batches)
    checkpoint = torch.load(file, weights_only=True)
    expected = averages(trace.trained, EMA(0.9))
    assert_equal(dict(checkpoint["state_dict"]), expected[4], TOLERANCE)
    assert_equal(dict(checkpoint["current_model_state"]), trace.trained[4])

    trainer.save_checkpoint(tmp_path / "end.ckpt")  # after the fit, when the module holds the average
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert_equal(dict(checkpoint["state_dict"]), expected[8], TOLERANCE)
    assert_equal(dict(checkpoint["current_model_state"]), trace.trained[8])


@resuming
@folded_and_own
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("configure", [adamw, sgd])
def test_resumed_equals_uninterrupted_bit_for_bit(regression, fit, tmp_path, path, configure, precision):
    average = EMA(0.9, start=2, every=3)
    whole, trace = regression(configure), Trace()
    arguments = dict(precision=precision, limit_val_batches=1.0)
    _, half = saved(fit, whole, tmp_path, "run", *callbacks_of(path, average, trace), **arguments)
    resumed, second = regression(configure), Trace()
    fit(resumed, *callbacks_of(path, average, second), epochs=4, ckpt_path=half, **arguments)
    assert list(second.trained) == [5, 6, 7, 8]
    for step in second.trained:
        assert_equal(second.trained[step], trace.trained[step])
    for step in (6, 8):
        assert_equal(second.validated[step], trace.validated[step])
    assert_equal(weights(resumed), weights(whole))


@folded_and_own
def test_resumed_from_a_checkpoint_saved_after_the_fit(regression, fit, tmp_path, path):
    average = EMA(0.9, every=3)
    whole, half, resumed = (regression(adamw) for _ in range(3))
    fit(whole, *callbacks_of(path, average), epochs=4)
    fit(half, *callbacks_of(path, average), epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, *callbacks_of(path, average), epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_equal(weights(resumed), weights(whole))


@resuming
@folded_and_own
@pytest.mark.parametrize("others", [list, lambda: [ExactResume()]], ids=["", "exact"])
@pytest.mark.parametrize("saved_by", ["ModelCheckpoint", "Trainer"])
def test_a_finished_run_that_is_started_again_has_the_average(regression, fit, tmp_path, path, others, saved_by):
    """Nothing is left to train, and the module and what is saved are as after the first start."""
    first, again = regression(adamw), regression(adamw)
    trainer, _ = saved(fit, first, tmp_path, "run", *others(), *callbacks_of(path, EMA(0.9)), limit_val_batches=1.0)
    file = tmp_path / "run/epoch=3.ckpt"
    if saved_by == "Trainer":
        trainer.save_checkpoint(file := tmp_path / "end.ckpt")
    trainer = fit(again, *others(), *callbacks_of(path, EMA(0.9)), epochs=4, ckpt_path=file, limit_val_batches=1.0)
    assert_equal(weights(again), weights(first))
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    before, after = (torch.load(each, weights_only=False) for each in (file, tmp_path / "again.ckpt"))
    for name in ("state_dict", "current_model_state"):
        assert_equal(dict(after[name]), dict(before[name]))
    assert not torch.equal(after["state_dict"]["net.0.weight"], after["current_model_state"]["net.0.weight"])


@resuming
@pytest.mark.parametrize("paths", [PATHS, PATHS[::-1]], ids=str)
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("configure", [adamw, sgd])
def test_a_checkpoint_continues_the_other_way(regression, fit, tmp_path, configure, every, paths):
    """First in the step and then in a separate pass, and the reverse; the step count continues."""
    average = EMA(0.9, every=every)
    whole, resumed = regression(configure), regression(configure)
    _, half = saved(fit, whole, tmp_path, "run", *callbacks_of(paths[0], average))
    fit(resumed, *callbacks_of(paths[1], average), epochs=4, ckpt_path=half)
    assert_equal(weights(resumed), weights(whole), TOLERANCE)


@folded_and_own
def test_the_file_of_the_best_epoch_holds_the_weights_that_were_measured(regression, fit, data, tmp_path, path):
    keep = ModelCheckpoint(tmp_path / "best", save_top_k=1, monitor="val_loss")
    trace, module = Trace(), regression(adamw)
    arguments = dict(limit_val_batches=1.0, enable_checkpointing=True)
    trainer = fit(module, *callbacks_of(path, EMA(0.9), trace, keep), **arguments)
    checkpoint = torch.load(keep.best_model_path, weights_only=True)
    expected = averages(trace.trained, EMA(0.9))
    assert_equal(dict(checkpoint["state_dict"]), expected[checkpoint["global_step"]], TOLERANCE)
    (measured,) = trainer.validate(module, data(), ckpt_path="best", verbose=False)
    assert measured["val_loss"] == pytest.approx(float(keep.best_model_score), abs=TOLERANCE)
    assert_equal(weights(module), dict(checkpoint["state_dict"]))


@folded_and_own
def test_tied_parameters_are_saved_under_both_names(regression, fit, tmp_path, path):
    class Tied(regression):
        def __init__(self):
            super().__init__(adamw)
            self.again = self.net[0]

    module = Tied()
    _, file = saved(fit, module, tmp_path, "run", *callbacks_of(path, EMA(0.9)))
    for weights_of in ("state_dict", "current_model_state"):
        checkpoint = torch.load(file, weights_only=True)[weights_of]
        assert_equal(checkpoint["again.weight"], checkpoint["net.0.weight"])


@folded_and_own
def test_buffers_are_the_models_own(regression, fit, tmp_path, path):
    class Counting(regression):
        def __init__(self):
            super().__init__(adamw)
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def training_step(self, batch, batch_idx):
            self.count += 1
            return super().training_step(batch, batch_idx)

    module = Counting()
    _, file = saved(fit, module, tmp_path, "run", *callbacks_of(path, EMA(0.9)), limit_val_batches=1.0)
    checkpoint = torch.load(file, weights_only=True)
    assert module.count == 16
    assert checkpoint["state_dict"]["count"] == checkpoint["current_model_state"]["count"] == 8


@resuming
@folded_and_own
def test_a_module_that_saves_only_some_weights_resumes(regression, fit, tmp_path, path):
    """As an adapter beside a frozen backbone does: `strict_loading = False` and a smaller state dict."""

    class Adapter(regression):
        def __init__(self):
            super().__init__(adamw)
            self.strict_loading = False
            self.net[0].requires_grad_(False)

        def state_dict(self, *args, **kwargs):
            return {name: p for name, p in super().state_dict(*args, **kwargs).items() if "net.0" not in name}

    whole, resumed = Adapter(), Adapter()
    _, half = saved(fit, whole, tmp_path, "run", *callbacks_of(path, EMA(0.9)))
    fit(resumed, *callbacks_of(path, EMA(0.9)), epochs=4, ckpt_path=half)
    assert_equal(weights(resumed), weights(whole))


@resuming
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*WeightAveraging")
def test_without_the_callback_a_checkpoint_starts_from_the_average(regression, fit, tmp_path):
    trace, module = Trace(), regression(adamw)
    _, half = saved(fit, module, tmp_path, "run", Fuse(), WeightAveraging(EMA(0.9)), trace)
    first = regression(adamw)
    fit(first, epochs=2, ckpt_path=half)
    assert_equal(weights(first), averages(trace.trained, EMA(0.9))[4], TOLERANCE)
