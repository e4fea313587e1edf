# SPDX-License-Identifier: Apache-2.0
"""LRSchedule in a run that is resumed, extended or repeated sees the rates of one that was not."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lr_schedule_cases import expected, groups_of, num_tokens, quiet, sgd

from lightning_optkit.callbacks import ExactResume, Fuse
from lightning_optkit.schedules import cosine, linear, warmup_cosine

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.mark.parametrize("interval", ["step", "epoch", "fractional_epoch", "sample"])
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_resumed_equals_uninterrupted(fit, regression, tmp_path, interval, fused):
    def callbacks():
        return [*([Fuse(verbose=False)] if fused else []), quiet(warmup_cosine(0.3), interval)]

    def configure(module):
        return torch.optim.AdamW(groups_of(module))

    whole, resumed = regression(configure), regression(configure)
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = fit(whole, *callbacks(), save, enable_checkpointing=True)
    again = fit(resumed, *callbacks(), ckpt_path=tmp_path / "epoch=0.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])
    rates = [[group["lr"] for group in t.optimizers[0].param_groups] for t in (trainer, again)]
    assert rates[0] == rates[1]


class SaveAt(pl.Callback):
    def __init__(self, path, where):
        self.path, self.where = path, where

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.where:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("where", [(0, 0), (1, 1), (1, 2), (1, 3)], ids=str)  # the even ones inside a window
@pytest.mark.parametrize("interval", ["step", "epoch", "fractional_epoch", "sample", "token"])
def test_resumed_in_the_middle_of_an_epoch(fit, regression, recorder, tmp_path, interval, where):
    arguments = dict(total=40, count=num_tokens) if interval == "token" else {}
    whole, resumed = regression(sgd), regression(sgd)
    path = tmp_path / "saved.ckpt"
    fit(whole, quiet(linear(), interval, **arguments), ExactResume(), SaveAt(path, where), recorder)
    expected_rates = recorder.values("lr")[2 * where[0] + (where[1] + 1) // 2 :]
    recorder.steps.clear()
    fit(resumed, quiet(linear(), interval, **arguments), ExactResume(), recorder, ckpt_path=path)
    assert recorder.values("lr") == expected_rates
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("interval", ["step", "epoch", "fractional_epoch", "sample"])
def test_resumed_within_the_last_validation_of_an_epoch(fit, regression, tmp_path, interval, epoch):
    """The epoch is not counted yet, though all its batches are: the run is no epoch longer."""

    class Watch(pl.Callback):
        def __init__(self):
            self.rates = []

        def on_validation_start(self, trainer, pl_module):
            if trainer.current_epoch == epoch and not trainer.sanity_checking and trainer.ckpt_path is None:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

        def on_train_epoch_end(self, trainer, pl_module):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    whole, resumed = Watch(), Watch()
    kwargs = dict(limit_val_batches=1)
    fit(regression(sgd), quiet(linear(), interval), ExactResume(), whole, **kwargs)
    path = tmp_path / "saved.ckpt"
    fit(regression(sgd), quiet(linear(), interval), ExactResume(), resumed, ckpt_path=path, **kwargs)
    assert resumed.rates == whole.rates[epoch:]


def test_the_schedule_grows_with_max_epochs(fit, regression, recorder, tmp_path):
    save = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    fit(regression(sgd), quiet(linear()), save, enable_checkpointing=True)
    fit(regression(sgd), quiet(linear()), recorder, epochs=5, ckpt_path=tmp_path / "last.ckpt")
    assert recorder.values("lr") == expected(linear(), range(6, 10), 10)


def test_a_checkpoint_holds_plain_types(fit, regression, tmp_path):
    save = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    fit(regression(sgd), quiet(linear()), save, enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["LRSchedule"] == {"schedule": repr(linear()), "counted": 0, "pending": 0}
    assert checkpoint["lr_schedulers"] == []


def test_another_schedule_on_resuming_is_said(fit, regression, tmp_path):
    save = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    fit(regression(sgd), quiet(linear()), save, enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"LRSchedule: resumed with cosine\(.*\) in place of linear\("):
        fit(regression(sgd), quiet(cosine()), epochs=4, ckpt_path=tmp_path / "last.ckpt")


def test_a_second_fit_starts_from_the_base_again(fit, regression, recorder):
    kept = []

    def configure(module):
        kept.extend([] if kept else [sgd(module)])
        return kept[0]  # as LightningCLI does

    module = regression(configure)
    fit(module, quiet(linear()))
    fit(module, quiet(linear()), recorder)
    assert recorder.values("lr") == expected(linear())
