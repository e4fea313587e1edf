# SPDX-License-Identifier: Apache-2.0
"""Two processes with BatchNorm statistics of their own train, once whole and once resumed; each saves its buffers.
So do two with directions of `LookSAM` of their own; one of these has overflowed.

Usage: python own_buffers_worker.py FOLDER. Started in two processes.
"""

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import ExactResume, LookSAM, WeightAveraging


def shards(whole):
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=not whole, process_group_backend="gloo")


STRATEGIES = {
    "full": lambda: shards(True),
    "sharded": lambda: shards(False),
    "ddp": lambda: DDPStrategy(process_group_backend="gloo", broadcast_buffers=False),
    "averaged": lambda: DDPStrategy(process_group_backend="gloo"),
    "window": lambda: DDPStrategy(process_group_backend="gloo"),
    "replaced": lambda: DDPStrategy(process_group_backend="gloo"),
}
NOT_AVERAGED = ("window", "replaced")
PLACES = ("batch", "validation")


class Normed(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.register_buffer("equal", torch.ones(3))
        self.register_buffer("not_saved", torch.ones(3), persistent=False)
        self.validated = []  # the means in the validation of the first epoch

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - 1).square().mean()

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        if not self.trainer.sanity_checking:
            self.validated.append(self.net[1].running_mean.clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self):
        x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x), 4, sampler=DistributedSampler(x, 2, self.global_rank, shuffle=False))

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(4, 4)), 4)


class Saves(pl.Callback):
    """Within an epoch, and while the module holds the average."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (0, 3):
            trainer.save_checkpoint(self.folder / "batch.ckpt")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if trainer.current_epoch == 0 and not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / "validation.ckpt")


class Overflows(Normed):
    """Its second process has an infinite gradient in the batch of the last direction before the save."""

    def __init__(self, overflows):
        super().__init__()
        self.overflows = overflows

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        is_last = (self.current_epoch, batch_idx) == (0, 3)
        return loss * torch.inf if self.overflows and is_last and self.global_rank else loss

    def on_after_backward(self):
        for param in self.parameters():
            param.grad.nan_to_num_(0.0, 0.0, 0.0)


def run_look_sam(overflows, folder=None, ckpt_path=None):
    """The rank, and the weights after a run, in which every third batch has two gradients."""
    trainer = pl.Trainer(
        callbacks=[ExactResume(), LookSAM(k=3), *([Saves(folder)] if folder else [])],
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy=STRATEGIES["replaced"](),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Overflows(overflows)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer.global_rank, {name: param.detach().clone() for name, param in module.named_parameters()}


def run(name, folder=None, ckpt_path=None):
    """The rank, and the buffers of this process after a run, trained and averaged."""
    averages = [] if name in NOT_AVERAGED else [WeightAveraging(EMA(0.5), average_buffers=True)]
    trainer = pl.Trainer(
        callbacks=[ExactResume(), *averages, *([Saves(folder)] if folder else [])],
        max_epochs=2,
        accumulate_grad_batches=5 if name == "window" else 1,
        val_check_interval=4 if name == "window" else 1.0,
        accelerator="cpu",
        devices=2,
        strategy=STRATEGIES[name](),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Normed()
    trainer.fit(module, ckpt_path=ckpt_path)
    trained = dict(module.named_buffers())
    for average in averages:
        trained = {name: average.trained(buffer).clone() for name, buffer in trained.items()}
    held = {"trained": trained, "averaged": dict(module.named_buffers()), "validated": module.validated[0]}
    return trainer.global_rank, held


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, results, rank = Path(sys.argv[1]), {}, 0
    for name in STRATEGIES:
        results[name] = {"whole": run(name, folder / name)[1]}
        for place in PLACES:
            rank, results[name][place] = run(name, ckpt_path=folder / name / f"{place}.ckpt")
    for name, overflows in (("look_sam", False), ("overflow", True)):
        whole = run_look_sam(overflows, folder / name)[1]
        results[name] = whole, run_look_sam(overflows, ckpt_path=folder / name / "batch.ckpt")[1]
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
