# SPDX-License-Identifier: Apache-2.0
"""Two processes (DDP), of which one fails; and, started again, a whole run and one resumed from what was saved.

Usage: python exception_worker.py FOLDER raises|resumed. Started in two processes.
"""

import os
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import ExactResume


class Stopped(pl.LightningModule):
    def __init__(self, case):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.case, self.seen, self.stopped_at = case, [], None

    def training_step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 3):
            self.stopped_at = time.monotonic()
            if self.case == "raises" and self.global_rank == 1:
                raise KeyError("disk full on the second process")
        self.seen.append(batch[0].sum().item())
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.002, momentum=0.5)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(64.0).view(16, 4) / 64), batch_size=1, shuffle=True)


def run(folder, case, resumed=False):
    """Saves what a process saw, its error, its warnings, its weights, and how long it took after it was stopped."""
    torch.manual_seed(2 if resumed else 1)
    trainer = pl.Trainer(
        callbacks=[
            ExactResume(),
            OnExceptionCheckpoint(folder, "again" if resumed else case),
        ],
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", start_method="popen"),
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, error = Stopped("" if resumed else case), None
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, ckpt_path=folder / f"{case}.ckpt" if resumed else "last")
        except BaseException as raised:
            error = type(raised).__name__
    said = [str(record.message) for record in records if "ExactResume" in str(record.message)]
    took = time.monotonic() - module.stopped_at if module.stopped_at else None
    result = {"error": error, "took": took, "said": said, "seen": module.seen, "weights": module.state_dict()}
    torch.save(result, folder / f"{'resumed from ' * resumed}{case} {trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, case = Path(sys.argv[1]), sys.argv[2]
    if case == "resumed":
        run(folder, "whole")
        run(folder, "raises", resumed=True)
        torch.distributed.barrier()  # wait until the other process has saved too
    else:
        run(folder, case)
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
