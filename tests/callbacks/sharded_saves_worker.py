# SPDX-License-Identifier: Apache-2.0
"""Two processes (FSDP2) save checkpoints, sharded and full, damage the newest, and resume; each saves its weights.

Usage: python sharded_saves_worker.py FOLDER. Started in two processes.
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
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import ExactResume


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 8)

    def configure_model(self):
        if not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - 1).square().mean()

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def train_dataloader(self):
        x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x), batch_size=4, shuffle=True)


class SaveTwice(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx in (1, 3):
            trainer.save_checkpoint(self.folder / f"{batch_idx}.ckpt")
            trainer.save_checkpoint(self.folder / "last.ckpt")  # over the one before


def run(folder, shards, ckpt_path=None, evaluated=None):
    trainer = pl.Trainer(
        callbacks=[ExactResume(), *([] if ckpt_path else [SaveTwice(folder)])],
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint=shards, process_group_backend="gloo"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Regression()
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        try:
            if evaluated is not None:
                trainer.validate(module, module.train_dataloader(), ckpt_path=evaluated, verbose=False)
            trainer.fit(module, ckpt_path=ckpt_path)
        except RuntimeError as error:
            return trainer, {"error": str(error)}
    weights = {name: p.full_tensor().detach() for name, p in module.named_parameters()}
    said = [str(record.message) for record in records if "SafeCheckpointIO" in str(record.message)]
    return trainer, {"weights": weights, "said": said}


def damage(trainer, path):
    """Cuts off the end of the last part."""
    if trainer.is_global_zero:
        part = path / "__1_0.distcp" if path.is_dir() else path
        part.write_bytes(part.read_bytes()[:-5])
    trainer.strategy.barrier()


def cases(folder, shards):
    folder.mkdir(exist_ok=True)
    trainer, whole = run(folder, shards)
    _, resumed = run(folder, shards, folder / "last.ckpt")
    damage(trainer, folder / "last.ckpt")
    damage(trainer, folder / "3.ckpt")
    _, from_the_one_before = run(folder, shards, folder / "last.ckpt", evaluated=folder / "1.ckpt")
    _, evaluated = run(folder, shards, folder / "1.ckpt", evaluated=folder / "last.ckpt")
    damage(trainer, folder / "1.ckpt")
    _, with_none = run(folder, shards, folder / "last.ckpt")
    return {
        "whole": whole,
        "resumed": resumed,
        "before": from_the_one_before,
        "evaluated": evaluated,
        "none": with_none,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = {"sharded": cases(folder / "sharded", True), "full": cases(folder / "full", False)}
    trainer, _ = run(folder, True)  # whole ones, for the tests
    torch.save(results, folder / f"{trainer.global_rank}.pt")
    trainer.strategy.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
