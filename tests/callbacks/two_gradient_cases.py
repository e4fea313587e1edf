# SPDX-License-Identifier: Apache-2.0
"""A module that a second run could disturb, and an explicit loop with a gradient made of two."""

from collections import UserList

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

RATE, MOMENTUM = 0.05, 0.8


class Untouched(UserList):
    """A list that a second pass does not put back, since it has more than plain values."""

    def __init__(self, given=()):
        super().__init__(given)
        self.owner = object()


class Classifier(pl.LightningModule):
    """With BatchNorm and dropout; `seen` are the first weights in every run of `training_step`."""

    def __init__(self, huge=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
            self.unused = nn.Linear(2, 2)
        self.huge, self.seen = huge, Untouched()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE, momentum=MOMENTUM)

    def training_step(self, batch, batch_idx):
        self.seen.append(self.net[0].weight.detach().clone())
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x.to(self.net[0].weight.dtype)), y)
        self.log("train_loss", loss)
        return loss * 1e38 if self.huge else loss


class SeedEachBatch(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(batch_idx)


def batches(count):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, 6, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(0, 3, (count, 4), generator=generator), strict=True))


def trained(make_trainer, callback, steps=200, accumulate=1, module=None, dtype=torch.float32, **arguments):
    module = module or Classifier()
    trainer = make_trainer(
        callback,
        SeedEachBatch(),
        epochs=1,
        accumulate_grad_batches=accumulate,
        precision="64-true" if dtype == torch.float64 else arguments.pop("precision", "32-true"),
        **arguments,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches(steps), batch_size=None))
    return module.net.state_dict()


def written_out(combined, rho, steps=200, accumulate=1, dtype=torch.float64, is_full=lambda batch: True):
    """SGD with momentum on `combined(g, g_p, batch)`, both as vectors; g_p is None where `is_full(batch)` is not."""
    net = Classifier().net.to(dtype)
    params = list(net.parameters())
    velocity = total = torch.zeros(sum(p.numel() for p in params), dtype=dtype)

    def add(direction):
        for p, part in zip(params, direction.split([p.numel() for p in params]), strict=True):
            p.data += part.view_as(p)

    for batch, (x, y) in enumerate(batches(steps)):

        def gradient(x=x, y=y, seed=batch):
            torch.manual_seed(seed)
            loss = nn.functional.cross_entropy(net(x.to(dtype)), y)
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

        g, g_p = gradient(), None
        if is_full(batch):
            statistics = [b.clone() for b in net.buffers()]
            kept = [p.detach().clone() for p in params]
            add(rho * g / g.norm())
            g_p = gradient()
            for t, k in zip([*params, *net.buffers()], [*kept, *statistics], strict=True):
                t.data = k
        total = total + combined(g, g_p, batch) / accumulate
        if batch % accumulate == accumulate - 1:
            velocity = MOMENTUM * velocity + total
            add(-RATE * velocity)
            total = torch.zeros_like(total)
    return net.state_dict()


def assert_close(actual, expected, tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value.double(), rtol=0, atol=tolerance, msg=name)
