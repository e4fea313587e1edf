# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of LRSchedule: modules, and the rates that each of six optimizer steps should see."""

import lightning.pytorch as pl
import pytest
import torch

from lightning_optkit.callbacks import LRSchedule

LR = 0.1
RUN = 6  # optimizer steps of three epochs of two windows of two batches of two


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=LR)


def groups_of(module, lr=LR):
    """Two groups at different rates."""
    first, _, last = module.net
    return [{"params": first.parameters(), "lr": lr}, {"params": last.parameters(), "lr": 0.3 * lr}]


def quiet(schedule, *args, **kwargs):
    return LRSchedule(schedule, *args, verbose=False, **kwargs)


def expected(schedule, positions=range(RUN), total=RUN, base=LR):
    return pytest.approx([base * schedule(position, total) for position in positions], rel=1e-6)


def num_tokens(batch):
    return 10 * len(batch[0])


class Adversaries(pl.LightningModule):
    """Two optimizers, stepped by hand, the second every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.other = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=LR), torch.optim.Adam(self.other.parameters(), lr=2 * LR)

    def training_step(self, batch, batch_idx):
        for optimizer, net in zip(self.optimizers(), (self.net, self.other), strict=True):
            if net is self.net or batch_idx % 2:
                optimizer.zero_grad()
                self.manual_backward(net(batch[0]).pow(2).mean())
                optimizer.step()


class Broken(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("broken")
