# SPDX-License-Identifier: Apache-2.0
"""Runs each case of test_release_gradients_sharded.py twice in two processes, with and without released gradients.

Usage: python release_gradients_worker.py OUTPUT_FOLDER CASE [CASE ...]. Started in two processes.
"""

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, GradientClipping, ReleaseGradients, WeightAveraging
from lightning_optkit.clipping import ClipPerTensor, ClipValue


class Regression(pl.LightningModule):
    """Three layers, each sharded on its own; the last one has a gradient in every second step only."""

    def __init__(self, dtype=torch.float32, mixed=False, reshard=True):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)]
        self.net, self.extra = nn.Sequential(*layers).to(dtype), nn.Linear(4, 3).to(dtype)
        self.mixed, self.reshard, self.alive, self.left, self.losses = mixed, reshard, [], [], []

    def configure_model(self):
        if isinstance(self.net[0].weight, DTensor):
            return
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.mixed else MixedPrecisionPolicy()
        shared = dict(mesh=self.device_mesh["data_parallel"], mp_policy=policy, reshard_after_forward=self.reshard)
        for layer in (self.net[0], self.net[2], self.extra):
            fully_shard(layer, **shared)
        fully_shard(self.net, **shared)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def training_step(self, batch, batch_idx):
        x, y = (t.to(self.net[0].weight.dtype) for t in batch)
        out = self.net(x)
        out.register_hook(self.look)
        loss = nn.functional.mse_loss(out.float(), y.float())
        if batch_idx % 2:
            loss = loss + self.extra(x).float().square().mean()
        self.losses.append(loss.detach().clone())
        return loss

    def look(self, grad):
        self.alive.append(sum(p.grad is not None for p in self.parameters()))

    def on_train_batch_end(self, *_):
        self.left.append(sum(p.grad is not None for p in self.parameters()))

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(16, 4, generator=generator), torch.randn(16, 3, generator=generator))
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=2, sampler=sampler)


def trainer_of(strategy, callbacks):
    return pl.Trainer(
        callbacks=callbacks,
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


CASES = {
    "plain": {},
    "average": dict(beside=lambda: [WeightAveraging(EMA(0.8))]),
    "by value": dict(beside=lambda: [GradientClipping(ClipValue(0.01))]),
    "by tensor": dict(beside=lambda: [GradientClipping(ClipPerTensor(0.01))]),
    "bf16, split24": dict(dtype=torch.bfloat16, rounding="split24"),
    "bf16 compute": dict(mixed=True),
    "kept gathered": dict(reshard=False),
}
REFUSED = {
    "ddp": dict(strategy=lambda: DDPStrategy(process_group_backend="gloo")),
}


def sharded():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def fit(releases, beside=list, rounding="nearest", strategy=sharded, **arguments):
    module = Regression(**arguments) if strategy is sharded else Plain()
    own = [ReleaseGradients()] if releases else []
    trainer = trainer_of(strategy(), [Fuse(rounding=rounding, verbose=False), *beside(), *own])
    trainer.fit(module)
    optimizer = trainer.optimizers[0]
    tensors = {name: p.to_local().detach().clone() for name, p in module.named_parameters()}
    for name, param in module.named_parameters():
        for key, value in optimizer.state[param].items():
            tensors[f"{name} {key}"] = (
                value.to_local().clone() if isinstance(value, DTensor) else torch.as_tensor(value)
            )
    return dict(tensors=tensors, losses=module.losses, alive=module.alive, left=module.left, steps=trainer.global_step)


class Plain(Regression):
    def configure_model(self):
        pass


def main(folder, *names):
    warnings.filterwarnings("ignore")
    for name in names:
        if name in CASES:
            found = {releases: fit(releases, **CASES[name]) for releases in (False, True)}
        else:
            try:
                found = fit(True, **REFUSED[name]) and "trained"
            except ValueError as error:
                found = str(error)
        torch.save(found, Path(folder) / f"{name} {torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
