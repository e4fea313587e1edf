# SPDX-License-Identifier: Apache-2.0
"""Runs that are resumed within an epoch by another number of processes, and again within the same epoch.

Usage: python elastic_worker.py FOLDER. Saves what each process saw, and the weights.
"""

import logging
import sys
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import ExactResume

sys.path.insert(0, str(Path(__file__).parents[1]))
from forked import QUIET, strategy_of, values

SAMPLES, BATCH = 40, 2
PATHS = {  # kind, number of processes, and batch of the second epoch at whose end it is saved; then how it goes on
    "2 to 1": [("ddp", 2, 2), ("one", 1, None)],
    "1 to 2": [("one", 1, 5), ("ddp", 2, None)],
    "2 to 3": [("ddp", 2, 2), ("ddp", 3, None)],
    "fsdp 2 to fsdp 3": [("fsdp sharded", 2, 2), ("fsdp sharded", 3, None)],
    "2 to 1 to 1": [("ddp", 2, 2), ("one", 1, 12), ("one", 1, None)],
    "2 to 3 to 3": [("ddp", 2, 2), ("ddp", 3, 4), ("ddp", 3, None)],
    "3 to 2 to 1 to 2": [("ddp", 3, 1), ("ddp", 2, 5), ("one", 1, 15), ("ddp", 2, None)],
    "last batch": [("ddp", 2, 9), ("one", 1, None)],
}
WINDOWS = {  # the same with four batches per step, saved after three
    "2": [("ddp", 2, None)],
    "2 to 2": [("ddp", 2, 2), ("ddp", 2, None)],
    "2 to 1": [("ddp", 2, 2), ("one", 1, None)],
    "fsdp 2": [("fsdp sharded", 2, None)],
    "fsdp 2 to 2": [("fsdp sharded", 2, 2), ("fsdp sharded", 2, None)],
    "fsdp 2 to ddp 3": [("fsdp full", 2, 2), ("ddp", 3, None)],
    "2 to fsdp 2": [("ddp", 2, 2), ("fsdp sharded", 2, None)],
}


def loss(net, x):
    return (net(x / SAMPLES) - 1).square().mean()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(2, 8)
        self.seen, self.grads = {}, []

    def configure_model(self):
        if "ModelParallel" in type(self.trainer.strategy).__name__ and not hasattr(self.net, "reshard"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        self.seen.setdefault(self.current_epoch, []).extend(batch[0][:, 0].int().tolist())
        return loss(self.net, batch[0]) * (1 if self.trainer.accumulate_grad_batches > 1 else 1 + torch.rand(1).item())

    def on_before_optimizer_step(self, optimizer):
        self.grads.append(whole(self.net.weight.grad).clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SaveAt(pl.Callback):
    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, self.batch):
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def run(kind, world, path, at, ckpt_path, accumulate):
    """One part of a run; what it saw in each epoch, its weights, and what it said."""
    pl.seed_everything(3 if ckpt_path is None else 4, verbose=False)
    module = Net()
    trainer = pl.Trainer(
        **QUIET,
        **strategy_of(kind, world),
        callbacks=[ExactResume(), *([] if at is None else [SaveAt(path, at)])],
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
    )
    data = torch.arange(SAMPLES).float()[:, None].expand(SAMPLES, 2)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(TensorDataset(data), BATCH, shuffle=True), ckpt_path=ckpt_path)
    said = [str(record.message) for record in records if "ExactResume" in str(record.message)]
    weights = {name: whole(param.detach()) for name, param in module.named_parameters()}
    return dict(seen=module.seen, weights=weights, said=said, grads=module.grads)


def chain(folder, name, parts, accumulate=1):
    """The parts of a run one after the other, each resumed from the one before."""
    results, ckpt_path = [], None
    for number, (kind, world, at) in enumerate(parts):
        path = f"{folder}/{name} {number}.ckpt"
        results.append(values(partial(run, kind, world, path, at, ckpt_path, accumulate), world))
        ckpt_path = path
    return results


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    result = {name: chain(folder, name, PATHS[name]) for name in PATHS}
    windows = {name: chain(folder, f"window {name}", WINDOWS[name], accumulate=4) for name in WINDOWS}
    torch.save({"result": result, "windows": windows}, folder / "result.pt")
