# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of Augment: images, a module that keeps its batches and losses, and its runs."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

IMAGES = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def cross_entropy(logits, y):
    return F.cross_entropy(logits, y)


class Classifier(pl.LightningModule):
    """Records batches by stage, and the loss of every training step."""

    def __init__(self, loss=cross_entropy, configure=lambda module: torch.optim.SGD(module.parameters(), lr=0.1)):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
        self.loss, self.configure, self.seen, self.losses, self.logits = loss, configure, {}, [], []

    def training_step(self, batch, batch_idx):
        self.seen.setdefault("train", []).append(batch)
        self.logits.append(self.net(batch[0]))
        self.losses.append(self.loss(self.logits[-1], batch[1]))
        return self.losses[-1]

    def validation_step(self, batch, batch_idx):
        self.seen.setdefault("validate", []).append(batch)
        self.losses.append(F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.configure(self)


def loader(targets=LABELS, batch_size=2):
    return DataLoader(TensorDataset(IMAGES, targets), batch_size=batch_size)


def running(make_trainer):
    """As a fixture, run(module, *callbacks, targets, val, ckpt_path, **trainer): the Trainer after the fit."""

    def run_(module, *callbacks, targets=LABELS, val=None, ckpt_path=None, batch_size=2, train=None, **kwargs):
        trainer = make_trainer(*callbacks, **{"epochs": 1, "limit_val_batches": 1.0, **kwargs})
        trainer.fit(module, train or loader(targets, batch_size), val, ckpt_path=ckpt_path)
        return trainer

    return run_
