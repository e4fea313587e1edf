# SPDX-License-Identifier: Apache-2.0
"""Runs cases of test_course.py in two processes and saves, per rank, weights, optimizer state and what each step saw.

Usage: python course_worker.py OUTPUT_FOLDER CASE [CASE ...]. Started in two processes.
"""

import os
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optkit.callbacks import (
    Fuse,
    HyperparameterSchedule,
    LRSchedule,
    ParameterGroups,
    PlateauSchedule,
    ScheduleFree,
)
from lightning_optkit.optimizers import ScheduleFreeAdamW
from lightning_optkit.schedules import constant, linear, warmup, warmup_cosine

GLOBAL_BATCH, EPOCHS = 4, 3
LOSSES = [1.0, 1.2, 0.9]  # the mean gets worse, then better; one rank gets better at once


def num_positive(batch):
    """Differs from rank to rank; together it is that of the global batch."""
    return (batch[0] > 0).sum()


def quiet(callback, *args, **kwargs):
    return callback(*args, verbose=False, **kwargs)


CASES = {
    "samples": lambda: [
        quiet(ParameterGroups, weight_decay=0.2, layer_decay=0.5),
        quiet(LRSchedule, warmup(linear(), 6), "sample"),
        quiet(HyperparameterSchedule, "weight_decay", linear(), "epoch"),
        quiet(Fuse),
    ],
    "tokens": lambda: [quiet(LRSchedule, linear(), "token", total=150, count=num_positive)],
    "plateau": lambda: [
        quiet(LRSchedule, warmup_cosine(0.5)),
        quiet(PlateauSchedule, "scripted", patience=0, factor=0.5),
        quiet(ParameterGroups, weight_decay=0.2),
        quiet(HyperparameterSchedule, "betas[0]", warmup(constant(), 2)),
    ],
    "schedule-free": lambda: [ScheduleFree(), quiet(LRSchedule, linear(1.0, 0.5))],
}
RULES = {"schedule-free": ScheduleFreeAdamW}


class Steps(pl.Callback):
    """Rate, decay and first beta of every group at every optimizer step."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(self.record)

    def record(self, optimizer, *_):
        self.seen.append([(g["lr"], g["weight_decay"], g["betas"][0]) for g in optimizer.param_groups])


class Regression(pl.LightningModule):
    def __init__(self, rule=torch.optim.AdamW):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.rule = rule

    def configure_optimizers(self):
        return self.rule(self.parameters(), lr=0.02)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        """A metric that differs from rank to rank, and improves on one rank only."""
        apart = (0.5 - self.global_rank) * (self.trainer.world_size - 1)
        self.log("scripted", LOSSES[self.current_epoch] + apart * (self.current_epoch + 1))

    def loader(self):
        """Lightning would shuffle under DDP: each rank takes every second sample, in order."""
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(16, 4, generator=generator), torch.randn(16, 2, generator=generator))
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=GLOBAL_BATCH // self.trainer.world_size, sampler=sampler)

    train_dataloader = val_dataloader = loader


def run(case, world_size=1):
    """Three epochs of two steps of two batches."""
    strategy = DDPStrategy(process_group_backend="gloo", start_method="popen") if world_size > 1 else "auto"
    module, steps = Regression(RULES.get(case, torch.optim.AdamW)), Steps()
    trainer = pl.Trainer(
        callbacks=[*CASES[case](), steps],
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        num_sanity_val_steps=0,
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
    state = trainer.optimizers[0].state_dict()["state"]
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return trainer.global_rank, dict(weights=weights, state=state, seen=steps.seen)


class Sharded(Regression):
    """Its parameters are spread over the ranks (FSDP2)."""

    def configure_model(self):
        if not hasattr(self, "is_sharded"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
            self.is_sharded = True


def run_sharded(folder, ckpt_path=None):
    """The case "samples" without Fuse; a sharded checkpoint per epoch."""
    module = Sharded()
    save = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", save_distributed_checkpoint=True
    )
    trainer = pl.Trainer(
        callbacks=[*CASES["samples"]()[:-1], save],
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    weights = {name: p.full_tensor().detach().clone() for name, p in module.named_parameters()}
    groups = [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizers[0].param_groups]
    return dict(weights=weights, groups=[(g["name"], g["lr"], g["initial_lr"], g["weight_decay"]) for g in groups])


def main(folder, *cases):
    warnings.simplefilter("ignore")
    for case in cases:
        rank, result = run(case, world_size=2)
        torch.save(result, os.path.join(folder, f"{case} {rank}.pt"))

    whole = run_sharded(os.path.join(folder, "whole"))
    resumed = run_sharded(os.path.join(folder, "resumed"), os.path.join(folder, "whole", "epoch=0.ckpt"))
    rank = torch.distributed.get_rank()
    torch.save([whole, resumed], os.path.join(folder, f"sharded {rank}.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
