# SPDX-License-Identifier: Apache-2.0
"""Two processes (FSDP2) stop within an epoch and a window, save after the fit, and go on; each saves its weights.

Usage: python cut_epoch_worker.py FOLDER. Started in two processes.
"""

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from sharded_saves_worker import Regression

from lightning_optkit.callbacks import ExactResume

WINDOW, STOP = 3, 3  # batches per step, of five; the batch within the second window


class Validated(Regression):
    def val_dataloader(self):
        return self.train_dataloader()


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or batch_idx == STOP


def run(shards, path, ckpt_path=None, stops=False):
    trainer = pl.Trainer(
        callbacks=[ExactResume(), *([Stop()] if stops else [])],
        max_epochs=2,
        accumulate_grad_batches=WINDOW,
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint=shards, process_group_backend="gloo"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0 if ckpt_path is None else 1)
    module = Validated()
    trainer.fit(module, ckpt_path=ckpt_path)
    if stops:
        trainer.save_checkpoint(path)
    return trainer, {name: p.full_tensor().detach() for name, p in module.named_parameters()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, results = Path(sys.argv[1]), {}
    for kind in ("sharded", "full"):
        path = folder / f"{kind}.ckpt"
        trainer, whole = run(kind == "sharded", path)
        run(kind == "sharded", path, stops=True)
        results[kind] = whole, run(kind == "sharded", path, ckpt_path=path)[1]
    torch.save(results, folder / f"{trainer.global_rank}.pt")
    trainer.strategy.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
