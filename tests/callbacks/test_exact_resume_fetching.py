# SPDX-License-Identifier: Apache-2.0
"""A step that fetches its batch from a `dataloader_iter`, ended anywhere; and epochs that a batch not there ends."""

import os
import signal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_optkit.callbacks import ExactResume
from tests.callbacks.runs_saved_once import Saves

pytestmark = pytest.mark.filterwarnings("ignore")
HOOKS = ("on_train_batch_start", "training_step", "on_train_batch_end", "validation_step")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(8.0)[:, None])


class Net(pl.LightningModule):
    """Ends itself in a hook, the given time that it is called."""

    def __init__(self, ends=None, hook="", time=0):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.dropout, self.seen, self.last_hooks = nn.Linear(1, 4), nn.Dropout(0.5), [], 0
        self.ends, self.hook, self.left = ends, hook, time

    def _call(self, hook):
        self.left -= hook == self.hook
        if self.ends and hook == self.hook and self.left == 0:
            if self.ends == "exception":
                raise KeyError(hook)
            os.kill(os.getpid(), signal.SIGTERM)

    def _loss(self, x):
        self.seen.append((self.current_epoch, *x.flatten().tolist()))
        self._call("training_step")
        loss = self.dropout(self.net(x + torch.rand(1))).square().mean()
        self.log("loss", loss, batch_size=len(x))
        return loss

    def on_train_batch_start(self, batch, batch_idx):
        self._call("on_train_batch_start")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self._call("on_train_batch_end")

    def validation_step(self, batch, batch_idx):
        self._call("validation_step")

    def on_train_epoch_end(self):
        self.last_hooks += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.5)


class Fetches(Net):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self._loss(batch)


class EndsEpochs(Net):
    """Its first epoch has two batches."""

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if (self.current_epoch, batch_idx) == (0, 2) else None


def fit(folder, module, *callbacks, loader="shuffled", ckpt_path=None, logger=False, **kwargs):
    pl.seed_everything(1 if ckpt_path is None else 2, verbose=False)
    x = torch.arange(8.0)[:, None]
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[ExactResume(), OnExceptionCheckpoint(folder, "left"), *callbacks],
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **{"max_epochs": 3, "val_check_interval": 2, **kwargs},
    )
    train = DataLoader(Stream(), 2) if loader == "stream" else DataLoader(x, 2, shuffle=True)
    trainer.fit(module, train, DataLoader(x, 4), ckpt_path=ckpt_path)
    return module.seen, [param.tolist() for param in module.parameters()]


@pytest.mark.parametrize("loader", ["shuffled", "stream"])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("ends", ["exception", "SIGTERM"])
@pytest.mark.parametrize("time", [1, 2, 6])
def test_it_goes_on_where_it_ended(tmp_path, ends, hook, window, loader, time):
    facts = dict(loader=loader, accumulate_grad_batches=window)
    whole, weights = fit(tmp_path, Fetches(), **facts)
    with pytest.raises((KeyError, SIGTERMException)):
        fit(tmp_path, Fetches(ends, hook, time), **facts)
    resumed, same = fit(tmp_path, Fetches(), ckpt_path=tmp_path / "left.ckpt", **facts)
    assert resumed == whole[-len(resumed) :] and same == weights


@pytest.mark.parametrize("place", [(1, 0), (1, 1), (1, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("window", [2, 3])
def test_gradients_that_lightning_has_not_cleared_are_in_the_file(tmp_path, window, place):
    path = tmp_path / "saved.ckpt"
    _, weights = fit(tmp_path, Fetches(), Saves(path, "on_train_batch_end", place), accumulate_grad_batches=window)
    assert fit(tmp_path, Fetches(), ckpt_path=path, accumulate_grad_batches=window)[1] == weights


@pytest.mark.parametrize("epochs", [2, 3])
def test_an_epoch_that_a_loader_without_a_length_ended_ends_once(tmp_path, epochs):
    path = tmp_path / "saved.ckpt"
    whole, weights = fit(tmp_path, Fetches(), Saves(path, "on_train_epoch_end", (1,)), loader="stream")
    module = Fetches()
    resumed, same = fit(tmp_path, module, loader="stream", ckpt_path=path, max_epochs=epochs)
    assert module.last_hooks == epochs - 2 and len(resumed) == 4 * (epochs - 2)
    assert resumed == whole[8 : 4 * epochs] and (same == weights or epochs == 2)


@pytest.mark.parametrize("kind", [Fetches, EndsEpochs])
def test_what_is_logged_has_the_steps_of_one_run(tmp_path, kind):
    def rows(name, *callbacks, ckpt_path=None):
        logger = CSVLogger(tmp_path, name)
        fit(tmp_path, kind(), *callbacks, loader="stream", ckpt_path=ckpt_path, logger=logger)
        return (tmp_path / name / "version_0" / "metrics.csv").read_text().splitlines()

    path = tmp_path / "saved.ckpt"
    whole = rows("whole", Saves(path, "on_train_batch_end", (1, 1)))
    resumed = rows("resumed", ckpt_path=path)
    assert len(resumed) > 5 and resumed[1:] == whole[1 - len(resumed) :]
