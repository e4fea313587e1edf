# SPDX-License-Identifier: Apache-2.0
"""Trains on two processes (DDP), healthy or broken, and saves the verdicts of each rank.

Usage: python gradient_health_worker.py OUTPUT CASE. Started in two processes.
"""

import os
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import GradientHealth


class Regression(pl.LightningModule):
    def __init__(self, case):
        super().__init__()
        self.case = case
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def on_train_start(self):
        if self.case == "bypassed":  # as in a no_sync() that is never left, or a module called past DDP
            self.trainer.strategy.model.require_backward_grad_sync = False

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.case == "diverges" and self.global_rank == 1 and self.global_step == 4:
            with torch.no_grad():
                self.net[2].weight[0, 0] += 1e-6


class Dominated(Regression):
    """One class has all samples of the first process, and a third of those of the other one."""

    def training_step(self, batch, batch_idx):
        target = torch.arange(len(batch[0])) % 3 if self.global_rank else torch.zeros(len(batch[0]), dtype=torch.long)
        return nn.functional.cross_entropy(self.net(batch[0]).expand(-1, 3) * torch.arange(3), target)


def main(output, case):
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(32, 4, generator=generator), torch.randn(32, 1, generator=generator))
    health = GradientHealth(check_every=2, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=4,
        callbacks=[health], use_distributed_sampler=case != "duplicates", default_root_dir=os.path.dirname(output),
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = (Dominated if case == "dominated" else Regression)(case)
    trainer.fit(module, DataLoader(data, batch_size=4))
    assert not health._guard.failed, health._guard.failed
    with open(f"{output}/{case}.{trainer.global_rank}.json", "w") as file:
        file.write(health.to_json())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
