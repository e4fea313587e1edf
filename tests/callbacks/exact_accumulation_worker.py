# SPDX-License-Identifier: Apache-2.0
"""Trains on samples of unequal token counts in one process or two and saves the weights of the first.

Usage: python exact_accumulation_worker.py PATH PROCESSES. Started in two processes.
"""

import os
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import ExactAccumulation


class Masked(pl.LightningModule):
    """The loss is the mean over the tokens that are not padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        x, mask = batch
        return (self.net(x.unsqueeze(-1)).squeeze(-1) - x.sin()).square()[mask].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
        mask = torch.arange(5) < torch.tensor([1, 5, 2, 4] * 4).unsqueeze(1)
        return DataLoader(TensorDataset(x, mask), batch_size=4 // self.trainer.world_size)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path, processes = sys.argv[1], int(sys.argv[2])
    two = DDPStrategy(process_group_backend="gloo", start_method="popen")
    trainer = pl.Trainer(
        callbacks=[ExactAccumulation(lambda batch: batch[1].sum())],
        max_epochs=2,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=processes,
        strategy=two if processes > 1 else "auto",
        use_distributed_sampler=processes > 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Masked()
    if processes > 1:
        from torch.utils.data import DistributedSampler

        plain = module.train_dataloader

        def ordered():
            loader = plain()
            sampler = DistributedSampler(loader.dataset, processes, trainer.global_rank, shuffle=False)
            return DataLoader(loader.dataset, loader.batch_size, sampler=sampler)

        module.train_dataloader = ordered
    trainer.fit(module)
    if trainer.global_rank == 0:
        torch.save(module.state_dict(), path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
