# SPDX-License-Identifier: Apache-2.0
"""Runs whose processes get signals or fail, and those resumed from what they left.

Usage: python signal_worker.py FOLDER
"""

import logging
import os
import random
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import ExactResume
from lightning_optkit.callbacks.seams import failed_alone

sys.path.insert(0, str(Path(__file__).parents[1]))
from forked import KINDS, QUIET, finish, start, strategy_of, values

STOPS = [("one", "all"), ("ddp", "second"), ("ddp", "all"), ("fsdp full", "first"), ("fsdp sharded", "second")]
FAILS = [("fsdp full", "one fails"), ("fsdp sharded", "one fails"), ("fsdp sharded", "all fail")]


class Net(pl.LightningModule):
    def __init__(self, case=""):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.dropout, self.case = nn.Linear(4, 4), nn.Dropout(0.5), case

    def configure_model(self):
        if "ModelParallel" in type(self.trainer.strategy).__name__ and not hasattr(self.net, "reshard"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        if "stops" in self.case:
            time.sleep(0.01)
            if self.global_step == 2 and self.global_rank == 0:
                Path(self.case.split(":")[1]).touch()
        if (self.current_epoch, batch_idx) == (1, 3):
            if self.case == "all fail" or (self.case == "one fails" and self.global_rank == 1):
                raise KeyError("out of luck")
        return self.dropout(self.net(batch[0])).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.5)


def run(folder, kind, case="", ckpt_path=None, epochs=3):
    """The weights, or how long ago it was stopped, the error and what was said."""
    pl.seed_everything(1 if ckpt_path is None else 2, verbose=False)
    module = Net(case)
    saves = [OnExceptionCheckpoint(folder, "left"), ModelCheckpoint(folder, "step {step}", every_n_train_steps=4)]
    trainer = pl.Trainer(
        **QUIET,
        **strategy_of(kind, KINDS[kind]),
        callbacks=[ExactResume(), *(saves if case else [])],
        enable_checkpointing=bool(case),
        max_epochs=epochs,
        default_root_dir=folder,
    )
    data = TensorDataset(torch.arange(128.0).view(32, 4) / 128)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, DataLoader(data, 2, shuffle=True), ckpt_path=ckpt_path)
        except (SIGTERMException, KeyError, RuntimeError) as error:
            said = [str(record.message) for record in records if "ExactResume" in str(record.message)]
            return dict(error=type(error).__name__, at=time.time(), said=said, step=trainer.global_step)
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for name, p in module.named_parameters()
    }


def stop(folder, kind, who):
    """Sends SIGTERM in the middle of a run."""
    folder.mkdir()
    mark = folder / "mark"
    pids, results = start(partial(run, folder, kind, f"stops:{mark}", epochs=100), KINDS[kind], waits=False)
    while not mark.exists():
        time.sleep(0.001)
    time.sleep(random.random() * 0.05)
    sent = time.time()
    for pid in {"first": pids[:1], "second": pids[1:], "all": pids}[who]:
        os.kill(pid, signal.SIGTERM)
    ended = [each.value or each.error for each in finish(pids, results, 60)]
    left = folder / "left.ckpt"
    resumed = values(partial(run, folder, kind, ckpt_path=left), KINDS[kind])[0] if left.exists() else None
    return dict(ended=ended, sent=sent, resumed=resumed)


def fail(folder, kind, case):
    folder.mkdir()
    begun = time.time()
    started = start(partial(run, folder, kind, case), KINDS[kind], waits=False)
    ended = [each.value or each.error for each in finish(*started, 60)]
    left = folder / "left.ckpt"
    resumed = values(partial(run, folder, kind, ckpt_path=left), KINDS[kind])[0] if left.exists() else None
    return dict(ended=ended, begun=begun, resumed=resumed)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    failed_alone.SECONDS_FOR_OTHERS = 3.0  # a process whose other one does not fail waits all of it
    folder = Path(sys.argv[1])
    result = {"whole": {kind: values(partial(run, folder, kind), KINDS[kind])[0] for kind in KINDS}}
    result["stopped"] = {each: stop(folder / " ".join(each), *each) for each in STOPS}
    result["failed"] = {each: fail(folder / " ".join(each), *each) for each in FAILS}
    torch.save(result, folder / "result.pt")
