# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of test_start.py, in two processes when given a folder, and saves per rank what came of them.

Usage: python start_worker.py OUTPUT_FOLDER. Started in two processes.
"""

import os
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import Augment, Initialize, Preprocess
from lightning_optkit.data import GaussianNoise, Impute, Mixup, RobustScale, Standardize, Whiten
from lightning_optkit.init import he, lsuv

GLOBAL_BATCH, NUM_ROWS = 4, 15  # an odd number: DistributedSampler repeats a row

generator = torch.Generator().manual_seed(1)
ROWS = 1e3 + 7 * torch.randn(NUM_ROWS, 4, generator=generator, dtype=torch.float64)
HOLED = ROWS.masked_fill(torch.rand(NUM_ROWS, 4, generator=generator) < 0.2, torch.nan)
TARGETS = torch.randn(NUM_ROWS, 2, generator=generator)


class Regression(pl.LightningModule):
    """Every rank starts from other weights, as a careless user's may."""

    def __init__(self, world_size):
        super().__init__()
        torch.manual_seed(10 + int(os.environ.get("LOCAL_RANK", 0)))
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
        self.world_size, self.seen, self.shards = world_size, [], False

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self.shards:
            with torch.device("meta"):
                self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
            self.shards = True

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append((x.clone(), y.clone()))
        loss = nn.functional.mse_loss(self.net(x.float()), y.float())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def noisy():
    return [Augment([GaussianNoise(sigma=0.3), Mixup(1.0)], seed=5)]


CASES = {
    "statistics": lambda: [Preprocess([Impute("median"), Standardize(), Whiten()]), Preprocess(RobustScale(), field=1)],
    "he": lambda: [Initialize(he, seed=3)],
    "lsuv": lambda: [Preprocess([Impute(), Standardize()]), Initialize(lsuv, seed=3)],
    "augment": lambda: [Preprocess([Impute(), Standardize()]), Initialize(he, seed=3), *noisy()],
    "sharded he": lambda: [Initialize(he, seed=3)],
    "sharded lsuv": lambda: [Preprocess([Impute(), Standardize()]), Initialize(lsuv, seed=3)],
}


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def run(case, world_size=1, folder=None):
    """Two steps."""
    callbacks, module = CASES[case](), Regression(world_size)
    strategy = "auto"
    if world_size > 1 and case.startswith("sharded"):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    elif world_size > 1:
        strategy = DDPStrategy(process_group_backend="gloo", start_method="popen")
    trainer = pl.Trainer(
        callbacks=callbacks,
        max_steps=0 if case in ("he", "lsuv", "sharded he", "sharded lsuv") else 2,
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = HOLED if case in ("statistics", "lsuv", "augment", "sharded lsuv") else ROWS / 1e3
    trainer.fit(module, DataLoader(TensorDataset(rows, TARGETS), batch_size=GLOBAL_BATCH // world_size))
    result = {"weights": {name: whole(p) for name, p in module.named_parameters()}, "seen": module.seen}
    result["buffers"] = {name: whole(b) for name, b in module.named_buffers()}
    result["learned"] = [callback.state_dict() for callback in callbacks if isinstance(callback, Preprocess)]
    if case == "statistics" and folder is not None:
        trainer.save_checkpoint(os.path.join(folder, "statistics.ckpt"))
    return trainer.global_rank, result


def main(folder):
    warnings.simplefilter("ignore")
    for case in CASES:
        rank, result = run(case, world_size=2, folder=folder)
        torch.save(result, os.path.join(folder, f"{case} {rank}.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
