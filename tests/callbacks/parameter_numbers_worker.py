# SPDX-License-Identifier: Apache-2.0
"""Two processes (FSDP2) resume what one process saved with groups in another order than the module's, and save it.

Usage: python parameter_numbers_worker.py FOLDER CASE.... Started in two processes.
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
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optkit.callbacks import ExactResume, Fuse, ParameterGroups

RATES = {"net.0.*": {"lr": 0.03}, "net.2.*": {"lr": 0.03}}
CASES = {
    "ParameterGroups": (False, lambda: [ParameterGroups(overrides=RATES, verbose=False)]),
    "Fuse": (True, lambda: [Fuse(verbose=False)]),
    "ExactResume": (True, lambda: [ExactResume()]),
    "all": (True, lambda: [ParameterGroups(overrides=RATES, verbose=False), Fuse(verbose=False), ExactResume()]),
}


class Regression(pl.LightningModule):
    """Layers of equal shapes, so that a state of another layer is taken without a word."""

    def __init__(self, groups_by_hand):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(4)])
        self.groups_by_hand = groups_by_hand

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.net[0], FSDPModule):
            for layer in self.net:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[0].flip(1)).square().mean()

    def configure_optimizers(self):
        params = list(self.parameters())
        groups = [{"params": params[1::2]}, {"params": params[::2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups if self.groups_by_hand else params, lr=0.02)

    def train_dataloader(self):
        data = TensorDataset(torch.randn(32, 6, generator=torch.Generator().manual_seed(1)))
        processes, rank = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(data, 4 // processes, sampler=DistributedSampler(data, processes, rank, shuffle=False))


def run(case, epochs, ckpt_path=None, shards=False, without=False):
    """The Trainer and the weights after a fit; `without` leaves out the callbacks."""
    groups_by_hand, callbacks = CASES[case]
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False, process_group_backend="gloo")
    trainer = pl.Trainer(
        callbacks=[] if without else callbacks(),
        max_epochs=epochs,
        accelerator="cpu",
        devices=2 if shards else 1,
        strategy=strategy if shards else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Regression(groups_by_hand)
    trainer.fit(module, ckpt_path=ckpt_path)
    weights = {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in module.named_parameters()}
    return trainer, weights


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, results = Path(sys.argv[1]), {}
    for case in CASES:
        trainer, results[case] = run(case, 2, folder / f"{case}.ckpt", shards=True)
        trainer.save_checkpoint(folder / f"{case} sharded.ckpt")
    try:
        run("Fuse", 2, folder / "without.ckpt", shards=True)
    except RuntimeError as error:
        results["refused"] = str(error)
    torch.save(results, folder / f"{trainer.global_rank}.pt")
    trainer.strategy.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
