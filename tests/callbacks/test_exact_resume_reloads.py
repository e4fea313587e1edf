# SPDX-License-Identifier: Apache-2.0
"""Loaders are made again in the epochs in which the run that was not interrupted makes them."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import ExactResume

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = torch.arange(12.0)[:, None] / 10
EPOCHS = 7


class Reloads(pl.LightningModule):
    """Notes in which epochs its loaders are made; that of training has other samples in each, some of them drawn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.seen, self.made = nn.Linear(1, 1), {}, {"train": [], "val": []}

    def train_dataloader(self):
        self.made["train"].append(self.current_epoch)
        return DataLoader((1 + self.current_epoch / 10) * DATA + torch.rand(1), 3, shuffle=True)

    def val_dataloader(self):
        self.made["val"].append(self.current_epoch)
        return DataLoader(DATA, 6)

    def training_step(self, batch, batch_idx):
        self.seen[self.current_epoch, batch_idx] = batch.flatten().tolist()
        return self.net(batch + torch.rand(1)).square().mean()

    def validation_step(self, batch, batch_idx):
        torch.rand(1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class SaveAt(pl.callbacks.Checkpoint):
    def __init__(self, path, where):
        self.path, self.where = path, where

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.where:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, pl_module):
        if (trainer.current_epoch, "end") == self.where:
            trainer.save_checkpoint(self.path)


def fit(ckpt_path=None, callbacks=(), path=None, **kwargs):
    torch.manual_seed(1 if ckpt_path is None else 2)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExactResume(), *callbacks],
        **{"max_epochs": EPOCHS, **kwargs},
    )
    module = Reloads()
    trainer.fit(module, ckpt_path=ckpt_path)
    if path is not None:
        trainer.save_checkpoint(path)
    return module


@pytest.mark.parametrize("where", [(0, 1), (0, "end"), (1, 1), (1, 3), (1, "end"), (2, 2), (3, "end")], ids=str)
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("kwargs", [{}, dict(check_val_every_n_epoch=2), dict(num_sanity_val_steps=0)], ids=str)
def test_saved_within_a_period(tmp_path, where, every, kwargs):
    kwargs = {**kwargs, "reload_dataloaders_every_n_epochs": every}
    whole = fit(callbacks=[SaveAt(tmp_path / "saved.ckpt", where)], **kwargs)
    resumed = fit(tmp_path / "saved.ckpt", **kwargs)
    assert resumed.seen and resumed.seen.items() <= whole.seen.items()
    assert resumed.net.weight.tolist() == whole.net.weight.tolist()
    # A process that goes on has to make its own; the next ones are those of the whole run.
    for kind, made in whole.made.items():
        later = [epoch for epoch in made if epoch > where[0] + 1]
        assert [epoch for epoch in resumed.made[kind] if epoch > where[0] + 1][-len(later) :] == later


def test_saved_after_a_fit(tmp_path):
    every = dict(reload_dataloaders_every_n_epochs=3)
    fit(path=tmp_path / "saved.ckpt", max_epochs=2, **every)
    whole, resumed = fit(**every), fit(tmp_path / "saved.ckpt", **every)
    assert resumed.seen and resumed.seen.items() <= whole.seen.items()
