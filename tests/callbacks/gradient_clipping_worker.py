# SPDX-License-Identifier: Apache-2.0
"""Trains with each kind of clip, folded and not, on one or two processes, and saves the weights.

Usage: python gradient_clipping_worker.py OUTPUT WORLD_SIZE. Lightning starts the second process.
"""

import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optkit.callbacks import Fuse, GradientClipping
from lightning_optkit.clipping import AutoClip, ClipUnitwise

GLOBAL_BATCH = 4


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(16, 4, generator=generator), torch.randn(16, 2, generator=generator))
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=GLOBAL_BATCH // self.trainer.world_size, sampler=sampler)


def run(callbacks, world_size):
    """Two epochs of two steps of two batches."""
    strategy = DDPStrategy(process_group_backend="gloo", start_method="popen") if world_size > 1 else "auto"
    module = Regression()
    trainer = pl.Trainer(
        callbacks=callbacks,
        max_epochs=2,
        accumulate_grad_batches=2,
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
    return trainer, {name: p.detach().clone() for name, p in module.named_parameters()}


def main(output, world_size):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = []
    for clip in (ClipUnitwise(0.02), AutoClip(30)):
        for others in ([Fuse(verbose=False)], []):
            trainer, weights = run([GradientClipping(clip), *others], world_size)
            results.append(weights)
    if trainer.is_global_zero:
        torch.save(results, output)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
