# SPDX-License-Identifier: Apache-2.0
"""A small net, callbacks that break its run, and what is compared."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import (
    SpikeGuard,
)

QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)

LR = 0.01


class Net(pl.LightningModule):
    """`bad` maps steps to what their batches suffer: "x100", "nan", "none"."""

    def __init__(self, bad=None, configure=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Dropout(0.05), nn.Linear(24, 3))
        self.bad, self.configure = bad or {}, configure
        self.losses, self.rates = [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        bad = self.bad.get(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1)
        if bad == "none":
            return None
        loss = nn.functional.cross_entropy(self.net(x * 100 if bad == "x100" else x), y)
        if bad == "x100":
            loss = loss * 20
        self.losses.append(float(loss.detach()))
        return loss * float("nan") if bad == "nan" else loss

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.rates.append(float(self.trainer.optimizers[0].param_groups[0]["lr"]))

    def configure_optimizers(self):
        return self.configure(self) if self.configure else torch.optim.AdamW(self.parameters(), LR)


def loader(batch_size=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(320, 6, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True)


def fit(module, *callbacks, steps=160, **kwargs):
    pl.seed_everything(3, verbose=False)
    arguments = {"max_steps": steps, "max_epochs": -1, "accelerator": "cpu", **QUIET, **kwargs}
    resumed = arguments.pop("ckpt_path", None)
    trainer = pl.Trainer(**arguments, callbacks=list(callbacks))
    trainer.fit(module, loader(), ckpt_path=resumed)
    return trainer


def guard(**kwargs):
    return SpikeGuard(**{"every": 20, "rewarm": 5, "warmup": 40, "verbose": False, **kwargs})


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Broken(pl.Callback):
    """Multiplies the rate in these steps."""

    def __init__(self, steps, factor=300):
        self.steps, self.factor = steps, factor

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = LR * (self.factor if trainer.global_step in self.steps else 1)


def frozen(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return [frozen(item) for item in value] if isinstance(value, list | tuple) else value


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(torch.nan_to_num(a, 1.5), torch.nan_to_num(b, 1.5))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(*pair) for pair in zip(a, b, strict=True))
    return a == b
