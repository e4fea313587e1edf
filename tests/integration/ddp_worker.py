# SPDX-License-Identifier: Apache-2.0
"""Runs cases of test_ddp.py in two processes and saves, per rank, what its module and optimizer hold.

Usage: python ddp_worker.py OUTPUT_FOLDER CASE [CASE ...]. Started in two processes.
"""

import os
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, WeightAveraging
from lightning_optkit.layers import LayerNorm, RMSNorm
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


class Normed(Regression):
    """Sequences, so that there are rows enough for the kernels; counts the batches that saw fused norms."""

    def __init__(self, configure, shards=False):
        super().__init__(configure)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.RMSNorm(8), nn.Linear(8, 2))
        self.shards, self.fused = shards, 0

    def configure_model(self):
        if self.shards and not hasattr(self.net, "set_requires_gradient_sync"):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[1], mesh=mesh)  # a norm by itself, and one inside of a larger unit
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        self.fused += self.are_fused()
        x, y = batch
        x = x[:, None] * torch.linspace(-1, 1, 160)[:, None]
        return super().training_step((x, y[:, None].expand(-1, 160, -1)), batch_idx)

    def are_fused(self):
        return isinstance(self.net[1], LayerNorm) and isinstance(self.net[3], RMSNorm)

    def are_torchs(self):
        """Of torch again, and whoever was sharded still is."""
        expected = [nn.LayerNorm, nn.RMSNorm]
        types = [type(self.net[1]), type(self.net[3])]
        if self.shards:
            types[0] = types[0].__bases__[-1] if hasattr(self.net[1], "reshard") else None
        return types == expected


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
    "norms": dict(configure=adamw, norms=True, clip=dict(gradient_clip_val=0.1)),
    "sharded norms": dict(configure=adamw, norms=True, shards=True),
    "skip": dict(configure=sgd, poisoned=(2, 0), clip=dict(gradient_clip_val=0.1), average=EMA(0.5, every=2)),
}


def strategy_of(shards):
    if shards:
        sizes = dict(data_parallel_size=2, tensor_parallel_size=1)
        return ModelParallelStrategy(**sizes, process_group_backend="gloo")
    return DDPStrategy(process_group_backend="gloo", start_method="popen")


def run(configure, clip=None, average=None, poisoned=None, norms=False, shards=False, world_size=1, fuse_norms=True):
    """Three epochs of two steps of two batches."""
    shards = shards and world_size > 1
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module = Normed(configure, shards) if norms else Regression(configure, poisoned)
    trainer = pl.Trainer(
        callbacks=[Fuse(verbose=False, norms=fuse_norms), *([WeightAveraging(average)] if average else [])],
        max_epochs=3,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=world_size,
        strategy=strategy_of(shards) if world_size > 1 else "auto",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)] if poisoned else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **(clip or {}),
    )
    trainer.fit(module)
    state = whole(trainer.optimizers[0].state_dict()["state"])
    result = dict(weights=whole(dict(module.named_parameters())), state=state, steps=trainer.global_step)
    if norms:
        result.update(fused=module.fused, torchs=module.are_torchs())
    return trainer.global_rank, result


def whole(values):
    """Of plain tensors, all the way down."""
    if isinstance(values, dict):
        return {name: whole(value) for name, value in values.items()}
    if not isinstance(values, torch.Tensor):
        return values
    return (values.full_tensor() if hasattr(values, "full_tensor") else values).detach().clone()


def main(folder, *cases):
    warnings.simplefilter("ignore")
    for case in cases:
        rank, result = run(**CASES[case], world_size=2)
        torch.save(result, os.path.join(folder, f"{case} {rank}.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
