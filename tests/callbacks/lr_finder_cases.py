# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of LRFinder: a module that any trace of a test would change, and its run."""

import random

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import (
    ExactResume,
    Fuse,
    GradientClipping,
    LRFinder,
    Preprocess,
    ScheduleFreeWrapper,
    WeightAveraging,
)
from lightning_optkit.clipping import AutoClip
from lightning_optkit.data import Standardize

QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)


class Net(pl.LightningModule):
    """Draws from every generator in each step; `rates` has those of the steps."""

    def __init__(self, lr=0.05, configure=None, dtype=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
        self.lr, self.configure, self.rates, self.own = lr, configure, [], np.random.default_rng(0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = random.random() + np.random.rand() + self.own.random()
        loss = nn.functional.mse_loss(self.net(x + 0.01 * noise), y)
        self.log("loss", loss)
        return loss

    def on_before_zero_grad(self, optimizer):
        self.rates.append([float(group["lr"]) for o in self.trainer.optimizers for group in o.param_groups])

    def configure_optimizers(self):
        if self.configure is not None:
            return self.configure(self)
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def data(**kwargs):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 4, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :2]), batch_size=32, **{"shuffle": True, **kwargs})


def fit(module, *callbacks, loader=None, ckpt_path=None, **kwargs):
    pl.seed_everything(3, verbose=False)
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 2, "accelerator": "cpu", **kwargs}, callbacks=list(callbacks))
    trainer.fit(module, data() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


def finder(**kwargs):
    return LRFinder(**{"min_lr": 1e-5, "num_steps": 60, "verbose": False, **kwargs})


def same(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def with_own_generator():
    return data(generator=torch.Generator().manual_seed(5))


STRATEGIES = {
    "Fuse, EMA, AutoClip": lambda: [Fuse(verbose=False), GradientClipping(AutoClip(50)), WeightAveraging(EMA(0.9))],
    "its own passes": lambda: [GradientClipping(AutoClip(50)), WeightAveraging(EMA(0.9))],
    "ExactResume": lambda: [ExactResume()],
    "ScheduleFreeWrapper": lambda: [ScheduleFreeWrapper()],
    "Preprocess": lambda: [Preprocess(Standardize())],
}


def trained(**kwargs):
    return finder(suggestion="trained", trial_steps=40, **kwargs)


class Once(torch.utils.data.IterableDataset):
    def __init__(self):
        x = torch.randn(256, 4)
        self.rows = iter(list(zip(x, x[:, :2], strict=True)))

    def __iter__(self):
        return self.rows
