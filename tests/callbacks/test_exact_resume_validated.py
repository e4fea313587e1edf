# SPDX-License-Identifier: Apache-2.0
"""Validations of a run that is stopped at a batch, and of the one that goes on from a checkpoint of the stop."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import ExactResume

pytestmark = pytest.mark.filterwarnings("ignore")
BATCHES, LAST = 6, 5
INTERVALS = {  # the settings of the Trainer, and the steps after which a run that is not stopped validates
    "dividing": (dict(val_check_interval=3), [3, 6, 9, 12, 15, 18]),
    "not dividing": (dict(val_check_interval=4), [4, 10, 16]),
    "over epochs": (dict(val_check_interval=4, check_val_every_n_epoch=None), [4, 8, 12, 16]),
    "each second epoch": (dict(check_val_every_n_epoch=2), [12]),
}


class Validates(pl.LightningModule):
    def __init__(self, stops_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.validated, self.seen, self.stops_at = nn.Linear(2, 1), [], [], stops_at

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx))
        if self.seen[-1] == self.stops_at:
            self.trainer.should_stop = True
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saves(pl.Callback):
    """At the end of the validation that follows the stop."""

    def __init__(self, path):
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        if trainer.should_stop:
            trainer.save_checkpoint(self.path)


def fit(stops_at=None, path=None, after_the_fit=False, ckpt_path=None, **settings):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[ExactResume(), *([] if path is None or after_the_fit else [Saves(path)])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    module, x = Validates(stops_at), torch.randn(BATCHES, 2, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(TensorDataset(x)), DataLoader(TensorDataset(x[:1])), ckpt_path=ckpt_path)
    if after_the_fit:
        trainer.save_checkpoint(path)
    return module


@pytest.mark.parametrize("after_the_fit", [True, False], ids=["saved after the fit", "saved in the validation"])
@pytest.mark.parametrize("stops_at", [(0, LAST), (1, LAST), (1, 3), (1, 2)], ids=str)
@pytest.mark.parametrize("interval", INTERVALS)
def test_only_the_stopped_run_has_a_validation_more(tmp_path, interval, stops_at, after_the_fit):
    settings, expected = INTERVALS[interval]
    whole = fit(**settings)
    assert whole.validated == expected
    path, step = tmp_path / "stopped.ckpt", stops_at[0] * BATCHES + stops_at[1] + 1
    stopped = fit(stops_at, path, after_the_fit, **settings)
    assert {*stopped.validated} - {step} == {each for each in expected if each < step}  # Lightning validates at a stop
    if not path.exists():  # it did not, in an epoch without a validation
        assert step not in stopped.validated
        return
    resumed = fit(ckpt_path=path, **settings)
    assert resumed.validated == [each for each in expected if each > step]
    assert resumed.seen == whole.seen[step:]
    assert torch.equal(resumed.net.weight, whole.net.weight)
