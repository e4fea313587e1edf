# SPDX-License-Identifier: Apache-2.0
"""Trains with clips, folded and not, on one process, two (DDP), or with sharded parameters (FSDP2); saves the weights.

Usage: python gradient_clipping_worker.py OUTPUT WORLD_SIZE. Started in two processes.
"""

import os
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optkit.callbacks import Fuse, GradientClipping
from lightning_optkit.clipping import AutoClip, ClipNorm, ClipPerTensor, ClipUnitwise, ClipValue, ZClip

GLOBAL_BATCH = 4
CLIPS = [
    ClipNorm(0.1),
    ClipValue(0.01),
    ClipPerTensor(0.05),
    ClipUnitwise(0.02),
    AutoClip(30),
    ZClip(0.5, alpha=0.5, warmup_steps=2),
]


class Regression(pl.LightningModule):
    def __init__(self, shards, is_poisoned):
        super().__init__()
        self.shards, self.is_poisoned = shards, is_poisoned
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))  # a bias of one element on two processes

    def configure_model(self):
        if self.shards:
            for layer in (self.net[0], self.net[2]):
                if not isinstance(layer, FSDPModule):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        return loss * torch.nan if self.is_poisoned and batch_idx == 2 else loss

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(16, 4, generator=generator), torch.randn(16, 1, generator=generator))
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=GLOBAL_BATCH // self.trainer.world_size, sampler=sampler)


def strategy_of(world_size, shards):
    if shards:
        return ModelParallelStrategy(world_size, 1, process_group_backend="gloo")
    return DDPStrategy(process_group_backend="gloo", start_method="popen") if world_size > 1 else "auto"


def run(callbacks, world_size, shards, is_poisoned=False):
    """Two epochs of two steps of two batches; poisoned: the second step of each has gradients of NaN."""
    module = Regression(shards, is_poisoned)
    trainer = pl.Trainer(
        callbacks=callbacks,
        max_epochs=2,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=world_size,
        strategy=strategy_of(world_size, shards),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return trainer, {name: (p.full_tensor() if shards else p).clone() for name, p in weights.items()}


def main(output, world_size):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = []
    for clip in CLIPS:
        for others in ([Fuse(verbose=False)], []):
            for shards in [False, True] if world_size > 1 else [False]:
                trainer, weights = run([GradientClipping(clip), *others], world_size, shards)
                results.append((f"{clip!r} {'folded' if others else 'own pass'}", shards, weights))
        if not isinstance(clip, ClipValue):
            for shards in [False, True] if world_size > 1 else [False]:
                trainer, weights = run([GradientClipping(clip), Fuse(verbose=False)], world_size, shards, True)
                results.append((f"{clip!r} with NaN", shards, weights))
    for clip in (ClipUnitwise(0.02), ClipPerTensor(0.05), ClipNorm(0.1)):
        for others in ([Fuse(verbose=False)], []):
            for shards in [False, True] if world_size > 1 else [False]:
                clipping = GradientClipping(clip, leave_out=["net.2.*"])
                trainer, weights = run([clipping, *others], world_size, shards)
                results.append(
                    (f"{clip!r} {'folded' if others else 'own pass'}, with a layer left out", shards, weights)
                )
    if trainer.is_global_zero:
        torch.save(results, output)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
