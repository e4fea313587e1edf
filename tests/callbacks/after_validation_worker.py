# SPDX-License-Identifier: Apache-2.0
"""Two processes (FSDP2) measure a fit that validates, and one that does not; each saves what was seen.

Usage: python after_validation_worker.py FOLDER. Started in two processes.
"""

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok


class Net(pl.LightningModule):
    """Four batches of three epochs in each of two processes.

    Args:
        steps: Whether the gradients are used; else they are made and cleared.
    """

    def __init__(self, steps=True):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        nn.init.zeros_(self.net[2].weight)  # rows that are equal, so that they are watched
        self.automatic_optimization = steps

    def configure_model(self):
        if not isinstance(self.net, FSDPModule):
            for module in (self.net[0], self.net)[not self.automatic_optimization :]:  # the head is the root's
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[0][:, :2])
        if not self.automatic_optimization:
            self.manual_backward(loss)
            self.zero_grad()
        return loss

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(3))), batch_size=4)

    def val_dataloader(self):
        return self.train_dataloader()


def seen(validates, steps=True):
    """The curves of every layer, the largest module of the optimizer, the verdicts and the shares of zeros."""
    health, sparse = ok.GradientHealth(check_every=1, verbose=False), ok.ElasticNet(l1=1e-3)
    report = ok.Report(write=False, measure_every=1, verbose=False)
    trainer = pl.Trainer(
        callbacks=[health, report, *([sparse] if steps else [])],
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(2, 1, process_group_backend="gloo"),
        limit_val_batches=1.0 if validates else 0,
        val_check_interval=3,  # within an epoch, behind which other hooks may ask for parameters
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(steps))
    curves = report.record.to_dict()["layers"] if steps else None
    return trainer, {
        "curves": curves,
        "names": [*report.record.to_dict()["grad_norm"]],
        "verdicts": [str(each) for each in health.verdicts],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {}
    for name, arguments in {"validated": (True,), "not": (False,), "idle": (True, False)}.items():
        trainer, results[name] = seen(*arguments)
    torch.save(results, Path(sys.argv[1]) / f"{trainer.global_rank}.pt")
    trainer.strategy.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
