# SPDX-License-Identifier: Apache-2.0
"""A small module, and data for it, for tests of what a resumed run goes on from."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Line(pl.LightningModule):
    def __init__(self, optimizer=torch.optim.AdamW):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.optimizer = nn.Linear(3, 3), optimizer

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[0].flip(1)).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.05)


def eight_batches():
    """Of four samples."""
    return DataLoader(TensorDataset(torch.randn(32, 3, generator=torch.Generator().manual_seed(1))), 4)
