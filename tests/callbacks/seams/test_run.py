# SPDX-License-Identifier: Apache-2.0
"""The length of a run, asked in every hook of it: also where an epoch is over that Lightning counts later."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks.seams.run import Run

QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
HOOKS = (
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_validation_start",
    "on_validation_end", "on_train_epoch_end", "on_train_end",
)  # fmt: skip


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch[0]).pow(2).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Asks(pl.Callback):
    """What the run says in each hook: (hook, epoch of the hook, end, steps before epochs 0 to 2)."""

    def __init__(self):
        self.answers, self.epoch = [], 0

    def ask(self, hook, trainer):
        if hook == "on_train_epoch_start":
            self.epoch = trainer.current_epoch
        if not trainer.sanity_checking:
            run = Run(trainer)
            self.answers.append((hook, self.epoch, run.steps_at_end(), [run.steps_before(e) for e in range(3)]))


for name in HOOKS:
    setattr(Asks, name, lambda self, trainer, *_, _name=name: self.ask(_name, trainer))


def fit(asks, *callbacks, ckpt_path=None, **kwargs):
    data = DataLoader(TensorDataset(torch.ones(28, 3)), batch_size=4)
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 3, "accelerator": "cpu", **kwargs}, callbacks=[asks, *callbacks])
    trainer.fit(Net(), data, data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("check", [1.0, 3])
def test_the_end_is_the_same_in_every_hook(window, check):
    fit(asks := Asks(), accumulate_grad_batches=window, val_check_interval=check)
    steps = -(-7 // window)
    assert {hook for hook, *_ in asks.answers} == set(HOOKS)
    assert [answer for answer in asks.answers if answer[2] != 3 * steps] == []
    assert [answer for answer in asks.answers if answer[3] != [0, steps, 2 * steps]] == []


def test_with_windows_that_grow():
    fit(asks := Asks(), GradientAccumulationScheduler({0: 1, 1: 2, 2: 7}))
    assert [answer for answer in asks.answers if answer[2] != 7 + 4 + 1] == []


def test_resumed_from_a_checkpoint_of_the_validation_at_an_epochs_end(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val", save_on_train_epoch_end=False, save_top_k=-1, filename="{step}")
    fit(Asks(), keep, enable_checkpointing=True)
    fit(asks := Asks(), keep, enable_checkpointing=True, ckpt_path=tmp_path / "step=7.ckpt")
    assert len(asks.answers) > 14 and [answer for answer in asks.answers if answer[2] != 21] == []
