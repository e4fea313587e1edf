# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of Initialize: a module on which any trace of a trial step shows, its runs, and what is drawn."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_optkit.init import initialize

ROWS = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


class Classifier(pl.LightningModule):
    """Everything in a training_step that must have no lasting effect: metrics, lists, BatchNorm, dropout, logging."""

    def __init__(self, width=8, configure=sgd, norm=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(4, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU(), nn.Dropout(0.5)]
            self.net = nn.Sequential(*layers, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
        self.accuracy, self.outputs, self.configure = MulticlassAccuracy(3), [], configure

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log_dict({"loss": loss})
        self.log("accuracy", self.accuracy(logits, y))
        self.outputs.append(float(loss.detach()))
        self.last = loss
        return loss

    def configure_optimizers(self):
        return self.configure(self)


def loader(shuffle=True):
    return DataLoader(TensorDataset(ROWS, LABELS), batch_size=2, shuffle=shuffle)


def starting(make_trainer):
    """As a fixture, start(module, *callbacks, steps, ckpt_path, train, **trainer): the Trainer after so many steps."""

    def start_(module, *callbacks, steps=0, ckpt_path=None, train=None, **kwargs):
        trainer = make_trainer(*callbacks, **{"epochs": None, "max_steps": steps, **kwargs})
        trainer.fit(module, loader() if train is None else train, ckpt_path=ckpt_path)
        return trainer

    return start_


def weights(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def drawn(scheme, module=None, seed=0):
    module = module or Classifier()
    initialize(module, scheme, generator=torch.Generator().manual_seed(seed))
    return weights(module)
