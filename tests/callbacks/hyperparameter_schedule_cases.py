# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of HyperparameterSchedule: optimizers, dropouts, and the values of six steps."""

import pytest
import torch
from torch import nn

from lightning_optkit.callbacks import HyperparameterSchedule

RUN = 6  # optimizer steps of three epochs of two windows of two batches of two


def scheduled(name, schedule, *args, **kwargs):
    return HyperparameterSchedule(name, schedule, *args, verbose=False, **kwargs)


def expected(schedule, base, positions=range(RUN), total=RUN):
    return pytest.approx([base * schedule(position, total) for position in positions], rel=1e-9)


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.2, betas=(0.8, 0.99))


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


class Regularized(nn.Module):
    """Dropouts of several kinds, one of them off."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.AlphaDropout(0.2))
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.unused = nn.MultiheadAttention(8, 2)
        self.recurrent = nn.GRU(8, 2, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x):
        x = self.inner(x)[:, None]
        return self.recurrent(self.attention(x, x, x)[0])[0][:, 0]

    def rates(self):
        inner = [self.inner[1].p, self.inner[2].p]
        return [*inner, self.attention.dropout, self.unused.dropout, self.recurrent.dropout]


def with_dropouts(regression):
    module = regression(sgd)
    module.net = Regularized()
    return module
