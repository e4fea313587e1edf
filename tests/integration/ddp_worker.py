# SPDX-License-Identifier: Apache-2.0
"""Runs cases of test_ddp.py in two processes and saves, per rank, what its module and optimizer hold.

Usage: python ddp_worker.py OUTPUT_FOLDER CASE [CASE ...]. Lightning starts the second process.
"""

import os
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, WeightAveraging
from lightning_optkit.optimizers import ScheduleFreeAdamW

GLOBAL_BATCH = 4


class Regression(pl.LightningModule):
    """`poisoned` is a pair of step and rank whose loss is infinite."""

    def __init__(self, configure, poisoned=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.configure, self.poisoned = configure, poisoned

    def configure_optimizers(self):
        return self.configure(self.parameters())

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x).float(), y)
        return loss * float("inf") if (self.global_step, self.global_rank) == self.poisoned else loss

    def train_dataloader(self):
        """Lightning would shuffle under DDP: each rank takes every second sample, in order."""
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(16, 4, generator=generator), torch.randn(16, 2, generator=generator))
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=GLOBAL_BATCH // self.trainer.world_size, sampler=sampler)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.02, weight_decay=0.1, fused=True)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def schedule_free(params):
    return ScheduleFreeAdamW(params, lr=0.05, weight_decay=0.1)


CASES = {
    "clip by norm": dict(configure=adamw, clip=dict(gradient_clip_val=0.1)),
    "clip by value": dict(configure=sgd, clip=dict(gradient_clip_val=0.01, gradient_clip_algorithm="value")),
    "average": dict(configure=adamw, average=EMA(0.5, start=2)),
    "schedule free": dict(configure=schedule_free),
    "skip": dict(configure=sgd, poisoned=(2, 0), clip=dict(gradient_clip_val=0.1), average=EMA(0.5, every=2)),
}


def run(configure, clip=None, average=None, poisoned=None, world_size=1):
    """Three epochs of two steps of two batches."""
    strategy = DDPStrategy(process_group_backend="gloo", start_method="popen") if world_size > 1 else "auto"
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module = Regression(configure, poisoned)
    trainer = pl.Trainer(
        callbacks=[Fuse(verbose=False), *([WeightAveraging(average)] if average else [])],
        max_epochs=3,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)] if poisoned else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **(clip or {}),
    )
    trainer.fit(module)
    state = trainer.optimizers[0].state_dict()["state"]
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return trainer.global_rank, dict(weights=weights, state=state, steps=trainer.global_step)


def main(folder, *cases):
    warnings.simplefilter("ignore")
    for case in cases:
        rank, result = run(**CASES[case], world_size=2)
        torch.save(result, os.path.join(folder, f"{case} {rank}.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
