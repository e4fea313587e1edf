# SPDX-License-Identifier: Apache-2.0
"""Trains attention with QKClip on one process or two (DDP, FSDP2, tensor parallelism), and saves the weights.

Usage: python qk_clip_worker.py OUTPUT WORLD_SIZE. Started in two processes.
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

from lightning_optkit.callbacks import QKClip

GLOBAL_BATCH = 4


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.attention, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.attention(x, x, x, need_weights=False)[0], y)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x, y = (torch.randn(16, 5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
        x[::2] *= 6  # the largest logits are those of one process
        data = TensorDataset(x, y)
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=GLOBAL_BATCH // self.trainer.world_size, sampler=sampler)


def run(strategy, world_size):
    callback, module = QKClip(0.5), Model()
    trainer = pl.Trainer(
        callbacks=[callback],
        max_epochs=2,
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    whole = {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in weights.items()}
    return trainer.global_rank, (whole, callback.max_logits)


def main(output, world_size):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    strategy = DDPStrategy(process_group_backend="gloo", start_method="popen") if world_size > 1 else "auto"
    rank, result = run(strategy, world_size)
    torch.save(result, f"{output}.{rank}")
    if world_size > 1:
        _, result = run(ModelParallelStrategy(world_size, 1, process_group_backend="gloo"), world_size)
        torch.save(result, f"{output}.{rank}.sharded")
        try:
            run(ModelParallelStrategy(1, world_size, process_group_backend="gloo"), world_size)
        except ValueError as error:
            torch.save(str(error), f"{output}.{rank}.refused")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
