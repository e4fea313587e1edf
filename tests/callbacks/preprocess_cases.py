# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of Preprocess: training and validation rows, and a module that keeps what it was given."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROWS = torch.randn(10, 4, generator=torch.Generator().manual_seed(3)) * 5 + 20
TARGETS = torch.randn(10, 2, generator=torch.Generator().manual_seed(4)) * 9 - 3
ELSEWHERE = torch.full((3, 4), 1e6)  # validation rows: would spoil every statistic


class Seen(pl.LightningModule):
    """Records its batches, by stage, in a list that Lightning does not inspect."""

    def __init__(self, configure=lambda module: torch.optim.SGD(module.parameters(), lr=0.01)):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(4, 2)
        self.seen, self.configure = {}, configure

    def keep(self, stage, batch):
        self.seen.setdefault(stage, []).append(batch)

    def training_step(self, batch, batch_idx):
        self.keep("train", batch)
        x = batch[0] if isinstance(batch, list | tuple) else batch["x"]
        return self.net(x.float()).square().mean()

    def validation_step(self, batch, batch_idx):
        self.keep("validate", batch)

    def test_step(self, batch, batch_idx):
        self.keep("test", batch)

    def predict_step(self, batch, batch_idx):
        self.keep("predict", batch)
        return batch

    def configure_optimizers(self):
        return self.configure(self)


def loader(*tensors, batch_size=4, **kwargs):
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, **kwargs)


def inputs_of(module, stage="train"):
    return torch.cat([batch[0] for batch in module.seen[stage]])


def running(make_trainer):
    """As a fixture, run(module, callbacks, train, val, ckpt_path=None, **trainer): the Trainer after the fit."""

    def run_(module, callbacks, train=None, val=None, ckpt_path=None, **kwargs):
        trainer = make_trainer(
            *callbacks, **{"epochs": 1, "limit_val_batches": 1.0, "num_sanity_val_steps": 0, **kwargs}
        )
        trainer.fit(module, loader(ROWS, TARGETS) if train is None else train, val, ckpt_path=ckpt_path)
        return trainer

    return run_
