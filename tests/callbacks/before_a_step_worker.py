# SPDX-License-Identifier: Apache-2.0
"""Two processes (FSDP2) save states of optimizers that are not there yet, and go on from them.

Usage: python before_a_step_worker.py FOLDER CASE.... Started in two processes.
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

import lightning_optkit as ok

KINDS = ("sharded", "full")


class Net(pl.LightningModule):
    """Eight batches of two epochs in one process, four in each of two.

    Args:
        optimizer: Makes the optimizer of parameters.
        manual: Whether it steps by itself, from the second batch on; stopped in the first if `stops`.
        late: Whether its last layer trains from the second epoch on.
        two: Whether that layer has an optimizer of its own, with manual steps.
    """

    def __init__(self, optimizer, manual=False, late=False, stops=False, two=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.optimizer, self.late, self.stops, self.two = optimizer, late, stops, two
        self.automatic_optimization = not manual

    def configure_model(self):
        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):
            for module in (self.net[0], self.net[2], self.net):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        if self.two:
            return [self.optimizer(self.net[place].parameters()) for place in (0, 2)]
        made = self.optimizer(self.parameters())
        return [made], [torch.optim.lr_scheduler.StepLR(made, 1, 0.5)]

    def training_step(self, batch, batch_idx):
        if self.late:
            self.net[2].requires_grad_(self.current_epoch > 0)
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[0][:, :2])
        if self.automatic_optimization:
            return loss
        if batch_idx == 0 and self.current_epoch == 0:
            self.trainer.should_stop = self.stops
            return None
        self.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers()[: 1 + self.current_epoch] if self.two else [self.optimizers()]:
            optimizer.step()
        return None

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(3))), batch_size=4)


class Saves(pl.Callback):
    """At the start of the training, or at the end of its first epoch."""

    def __init__(self, path, at_start):
        self.path, self.at_start = path, at_start

    def on_train_start(self, trainer, pl_module):
        if self.at_start:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, pl_module):
        if not self.at_start and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.05, weight_decay=0.1)


def one_pass(params):
    return ok.AdamW(params, lr=0.05, weight_decay=0.1, average=ok.EMA(0.5))


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def schedule_free(params):
    return ok.ScheduleFreeAdamW(params, lr=0.05)


def fuse():
    return [ok.Fuse(verbose=False)]


def switch():
    """The module is saved with its average, beside the point where it is trained, which no new optimizer has."""
    return [ok.ScheduleFree()]


def average():
    return [ok.WeightAveraging(ok.EMA(0.5))]


# The module, callbacks, and whether it is saved at the start.
CASES = {
    "before a step": (dict(optimizer=adamw), list, True),
    "before a step, fused": (dict(optimizer=adamw), fuse, True),
    "before a step, averaged": (dict(optimizer=adamw), average, True),
    "before a step, one pass": (dict(optimizer=one_pass), list, True),
    "stopped in its first batch": (dict(optimizer=adamw, manual=True), list, None),
    "one of two": (dict(optimizer=adamw, manual=True, two=True), list, False),
    "one of two, fused": (dict(optimizer=adamw, manual=True, two=True), fuse, False),
    "without momentum": (dict(optimizer=sgd), list, False),
    "without momentum, fused": (dict(optimizer=sgd), fuse, False),
    "schedule-free": (dict(optimizer=schedule_free), switch, False),
    "a layer that trains later": (dict(optimizer=adamw, late=True), list, False),
    "a layer that trains later, fused": (dict(optimizer=adamw, late=True), fuse, False),
}
OF_ONE_PROCESS = "before a step"


def fit(kind, module, *callbacks, ckpt_path=None):
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=kind == "sharded", process_group_backend="gloo")
    trainer = pl.Trainer(
        callbacks=[ok.ExactResume(), *callbacks],
        max_epochs=2,
        accelerator="cpu",
        **(dict(devices=1) if kind == "one" else dict(devices=2, strategy=strategy)),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def weights(module):
    return {n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for n, p in module.named_parameters()}


def run(case, kind, folder):
    """The weights of a run that is not saved, of one that is and goes on, and of one that goes on from the file."""
    arguments, callbacks, at_start = CASES[case]
    path, alone = folder / f"{case} {kind}.ckpt", Net(**arguments)
    fit(kind, alone, *callbacks())
    saved = Net(**arguments, stops=at_start is None)
    trainer = fit(kind, saved, *callbacks(), *([] if at_start is None else [Saves(path, at_start)]))
    if at_start is None:
        trainer.save_checkpoint(path)
    resumed = Net(**arguments)
    fit(kind, resumed, *callbacks(), ckpt_path=path)
    return trainer, [weights(each) for each in (alone, *([] if at_start is None else [saved]), resumed)]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, results = Path(sys.argv[1]), {}
    for case in CASES:
        for kind in KINDS:
            trainer, results[case, kind] = run(case, kind, folder)
    torch.save(results, folder / f"{trainer.global_rank}.pt")
    trainer.strategy.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
