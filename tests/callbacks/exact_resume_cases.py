# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of ExactResume: data sets and a module that draw in every step, and what saves them."""

import random

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Augmented(Dataset):
    """Draws noise from torch, NumPy and Python."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.full((4,), float(index)) / 10 + 0.1 * torch.rand(4) + 0.1 * np.random.rand() + random.random()


class Plain(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.full((4,), float(index)) / 10


class Dropping(pl.LightningModule):
    def __init__(self, adam=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.adam, self.draws = adam, True

    def training_step(self, batch, batch_idx):
        parts = batch.values() if isinstance(batch, dict) else [batch]
        noise = random.random() + np.random.rand()
        return sum(self.net(part.float()).square().mean() for part in parts) * (1 + noise)

    def validation_step(self, batch, batch_idx):
        torch.rand(1)

    def configure_optimizers(self):
        kind = torch.optim.AdamW if self.adam else torch.optim.SGD
        return kind(self.parameters(), lr=0.01)

    def on_train_epoch_start(self):
        if self.draws:
            torch.rand(3)  # between the checkpoint of an epoch's end and iter()


class SaveAt(pl.Callback):
    def __init__(self, path, where):
        self.path, self.where = path, where

    def save(self, trainer, place):
        if place == self.where and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, (trainer.current_epoch, batch_idx))

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, (trainer.current_epoch, "validation", trainer.fit_loop.batch_idx))

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, (trainer.current_epoch, "end"))


def augmented(**kwargs):
    return lambda: DataLoader(Augmented(), batch_size=2, **kwargs)


class Stateful(DataLoader):
    """Like torchdata's StatefulDataLoader: it skips what it had yielded, without loading it."""

    generator_before = resumed = None
    yielded = 0

    def state_dict(self):
        return {"before": self.generator_before, "yielded": self.yielded}

    def load_state_dict(self, state_dict):
        self.resumed = state_dict

    def __iter__(self):
        first = 0
        if self.resumed:
            torch.set_rng_state(self.resumed["before"])
            first, self.resumed = self.resumed["yielded"], None
        self.generator_before = torch.get_rng_state()
        return self._batches([*self.sampler], first)

    def _batches(self, places, first):
        for number in range(first, len(self)):
            self.yielded = number + 1
            chosen = places[number * self.batch_size : self.yielded * self.batch_size]
            yield torch.stack([self.dataset[place] for place in chosen])


class Interrupt(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.current_epoch == 1 and trainer.fit_loop.batch_idx == 2:
            raise RuntimeError("pulled the plug")

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)
