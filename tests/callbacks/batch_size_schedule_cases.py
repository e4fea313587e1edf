# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of BatchSizeSchedule: a loader of twelve samples, and what a run saw of it."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import BatchSizeSchedule

GROWS = {1: 4, 2: 6}  # of a loader of 12 samples with batch size 2: epochs of 6, 3 and 2 batches
SHRINKS = {0: 6, 1: 4, 2: 2}


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def schedule(sizes=GROWS, *args, **kwargs):
    return BatchSizeSchedule(sizes, *args, **{"verbose": False, "log": False, **kwargs})


def twelve(batch_size=2, **kwargs):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 4, generator=generator), torch.randn(12, 2, generator=generator)
    x[:, 0] = torch.arange(12)  # tells the sample
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, **kwargs)


class Seen(pl.Callback):
    """The samples of each batch, by epoch, and other facts seen in the hooks."""

    def __init__(self):
        self.batches, self.lengths, self.counts = {}, [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.lengths.append(trainer.num_training_batches)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.setdefault(trainer.current_epoch, []).append(batch[0][:, 0].int().tolist())

    def sizes(self):
        return [[len(batch) for batch in batches] for batches in self.batches.values()]


def training(regression, make_trainer):
    """As a fixture, train(*callbacks, loader, configure, ckpt_path, **trainer): module, trainer and what was seen."""

    def train_(*callbacks, loader=None, configure=sgd, ckpt_path=None, **kwargs):
        torch.manual_seed(3 if ckpt_path is None else 99)
        module, seen = regression(configure), Seen()
        trainer = make_trainer(*callbacks, seen, **{"accumulate_grad_batches": 1, **kwargs})
        trainer.fit(module, twelve() if loader is None else loader, ckpt_path=ckpt_path)
        return module, trainer, seen

    return train_


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])
