# SPDX-License-Identifier: Apache-2.0
"""Trains with batches that grow, and in each regime, in one process or two; saves the weights and the samples seen.

Usage: python batch_size_schedule_worker.py FILE PROCESSES. Started in two processes.
"""

import os
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optkit.callbacks import BatchRegime, BatchSizeSchedule


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[0].sin().sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self):
        x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
        size, data = 4 // self.trainer.world_size, TensorDataset(x)
        # In two processes Lightning puts in its own, of the same order: a batch of each makes one of these.
        sampler = DistributedSampler(data, 1, 0) if size == 4 else None
        return DataLoader(data, size, sampler=sampler)


def train(processes, callback):
    trainer = pl.Trainer(
        callbacks=[callback],
        max_epochs=3,
        accelerator="cpu",
        devices=processes,
        strategy=DDPStrategy(process_group_backend="gloo", start_method="popen") if processes > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Regression()
    trainer.fit(module)
    return trainer.global_rank, trainer.global_step, module.state_dict()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path, processes = sys.argv[1], int(sys.argv[2])
    grows = BatchSizeSchedule({1: 8 // processes, 2: 12 // processes}, "linear", verbose=False)
    rank, steps, weights = train(processes, grows)
    *_, full = train(processes, BatchRegime("full"))
    *_, mini = train(processes, BatchRegime(6 // processes))
    *_, single = train(processes, BatchRegime("single" if processes == 2 else 2))
    if rank == 0:
        regimes = dict(full=full, mini=mini, single=single)
        torch.save(dict(weights=weights, **regimes, steps=steps, samples=grows.samples_seen), path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
