# SPDX-License-Identifier: Apache-2.0
"""Two processes (FSDP2) fail within a window of accumulation, and go on from the file of it; each saves its weights.

Usage: python failed_window_worker.py FOLDER. Started in two processes.
"""

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from sharded_saves_worker import Regression
from torch import nn

from lightning_optkit.callbacks import ExactResume


class Failure(Exception):
    pass


class Layer(nn.Linear):
    """Fails in its forward pass on request."""

    fails = False

    def forward(self, x):
        if self.fails:
            raise Failure
        return super().forward(x)


class Validated(Regression):
    def __init__(self):
        super().__init__()
        self.net = Layer(8, 8)

    def val_dataloader(self):
        return self.train_dataloader()


class Fails(pl.Callback):
    """In the second epoch: in the validation within the first window, or in the batch behind it."""

    def __init__(self, case):
        self.case = case

    def on_validation_start(self, trainer, pl_module):
        self.act(trainer, pl_module, "forward pass of a validation")

    def on_validation_end(self, trainer, pl_module):
        self.act(trainer, pl_module, "after a validation")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.act(trainer, pl_module, "forward pass of a batch")

    def act(self, trainer, pl_module, place):
        if place == self.case and trainer.current_epoch == 1:
            if "forward" not in place:
                raise Failure
            pl_module.net.fails = True


CASES = ("after a validation", "forward pass of a validation", "forward pass of a batch")


def run(folder, case=None, ckpt_path=None):
    trainer = pl.Trainer(
        callbacks=[ExactResume(), *([Fails(case), OnExceptionCheckpoint(folder, case)] if case else [])],
        max_epochs=2,
        accumulate_grad_batches=4,
        val_check_interval=2,
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint=True, process_group_backend="gloo"),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(case),
    )
    torch.manual_seed(0 if ckpt_path is None else 1)
    module = Validated()
    try:
        trainer.fit(module, ckpt_path=ckpt_path)
    except Failure:
        assert case
        return trainer, {}
    return trainer, {name: p.full_tensor().detach() for name, p in module.named_parameters()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, results = Path(sys.argv[1]), {}
    trainer, results["whole"] = run(folder)
    for case in CASES:
        run(folder, case)
        results[case] = run(folder, ckpt_path=folder / f"{case}.ckpt")[1]
    torch.save(results, folder / f"{trainer.global_rank}.pt")
    trainer.strategy.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
