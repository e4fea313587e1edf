# SPDX-License-Identifier: Apache-2.0
"""A classifier that tests break in one part, and its data."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    """Body and head; tests override parts of it."""

    optimizer = staticmethod(torch.optim.SGD)

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1))
            self.head = nn.Linear(16, 3)

    def hidden(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.hidden(batch[0])), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.05)


def loader(poison=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    if poison is not None:
        x[poison] = float("nan")
    return DataLoader(TensorDataset(x, x[:, :3].nan_to_num().argmax(1)), batch_size=4)
