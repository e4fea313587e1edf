# SPDX-License-Identifier: Apache-2.0
"""Trains on samples of unequal token counts in one process or two and saves the weights of the first.

Usage: python exact_accumulation_worker.py PATH PROCESSES [shards]. Started in as many processes.
"""

import os
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optkit.callbacks import ExactAccumulation


class Masked(pl.LightningModule):
    """The loss is the mean over the tokens that are not padding. A scale is never sharded, has gradients and stays."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.scale = nn.Linear(1, 1), nn.Parameter(torch.ones(5))

    def configure_model(self):
        if sys.argv[3:] == ["shards"]:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        x, mask = batch
        return (self.scale * self.net(x.unsqueeze(-1)).squeeze(-1) - x.sin()).square()[mask].mean()

    def configure_optimizers(self):
        groups = [{"params": [*self.net.parameters()]}, {"params": [self.scale], "lr": 0.0}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    def train_dataloader(self):
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
        mask = torch.arange(5) < torch.tensor([1, 5, 2, 4] * 4).unsqueeze(1)
        data, world = TensorDataset(x, mask), self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=4 // world, sampler=sampler)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path, processes = sys.argv[1], int(sys.argv[2])
    strategy = "auto" if processes == 1 else DDPStrategy(process_group_backend="gloo")
    if sys.argv[3:] == ["shards"]:
        strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    trainer = pl.Trainer(
        callbacks=[ExactAccumulation(lambda batch: batch[1].sum())],
        max_epochs=2,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Masked()
    trainer.fit(module)
    weights = {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in module.named_parameters()}
    if trainer.global_rank == 0:
        torch.save(weights, path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
