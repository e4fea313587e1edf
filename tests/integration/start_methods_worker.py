# SPDX-License-Identifier: Apache-2.0
"""One run under DDP, its two processes started in each way that Lightning has; the weights afterwards.

Usage: python start_methods_worker.py FOLDER
"""

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import whole_run
from forked import QUIET

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import ExactResume, Fuse, GradientClipping, WeightAveraging
from lightning_optkit.clipping import AutoClip

METHODS = ("fork", "spawn", "popen")  # the last ends what is not the first process


class FromSeed(pl.Callback):
    """Every way of starting leaves other random states."""

    def on_train_start(self, trainer, pl_module):
        pl.seed_everything(5 + trainer.global_rank, verbose=False)


def weights_after(method):
    pl.seed_everything(1, verbose=False)
    module = whole_run.Net()
    trainer = pl.Trainer(
        **QUIET,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", start_method=method),
        callbacks=[
            FromSeed(),
            ExactResume(),
            Fuse(verbose=False),
            GradientClipping(AutoClip()),
            WeightAveraging(EMA(decay=0.9)),
        ],
        max_epochs=2,
        enable_checkpointing=False,
    )
    trainer.fit(module, whole_run.loader(), DataLoader(whole_run.Augmented(), 7))
    return trainer, {name: param.detach().clone() for name, param in module.named_parameters()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    is_second = "LOCAL_RANK" in os.environ  # started by popen, from the beginning of this script
    results = {}
    for method in METHODS[-1:] if is_second else METHODS:
        trainer, results[method] = weights_after(method)
    if trainer.is_global_zero:
        torch.save(results, Path(sys.argv[1]) / "result.pt")
    trainer.strategy.barrier()
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
