# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of test_regularizers.py in two processes and saves, per rank, what is left after each.

Usage: python regularizer_worker.py OUTPUT_FOLDER CASE [CASE ...]. Lightning starts the second process.
"""

import os
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_optkit.callbacks import (
    SAM,
    ActivationRegularization,
    DropoutSchedule,
    EarlyStoppingCriterion,
    ElasticNet,
    Fuse,
    GradientNoise,
    LabelSmoothing,
    MaxNorm,
    RDrop,
    StochasticDepth,
)
from lightning_optkit.schedules import linear

GLOBAL_BATCH = 4


class Alternating(nn.Module):
    """Dropout whose mask depends on nothing but how often it ran: the same in any number of processes."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, x):
        self.runs += self.training
        mask = torch.arange(x.shape[-1]) % 2 == self.runs % 2
        return torch.where(mask, 2 * x, 0.0) if self.training else x


class Classifier(pl.LightningModule):
    """A residual net; `dropout` is its dropout module. Random numbers start anew with each batch."""

    def __init__(self, dropout=None):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 8)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.dropout, self.head = dropout or nn.Identity(), nn.Linear(8, 3)

    def forward(self, x):
        h = self.stem(x)
        for branch in self.branches:
            h = h + branch(h)
        return self.head(self.dropout(h))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.0)

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 * self.current_epoch + batch_idx)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        """An error that rises, and that each process knows only of its own samples."""
        self.log("val_wrong", nn.functional.cross_entropy(self(batch[0]), (batch[1] + 1) % 3))

    def loader(self):
        """Lightning would shuffle under DDP: each rank takes every second sample, in order."""
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(16, 4, generator=generator), torch.randint(0, 3, (16,), generator=generator))
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=GLOBAL_BATCH // self.trainer.world_size, sampler=sampler)

    train_dataloader = val_dataloader = loader


# name -> callbacks, dropout. Those of RANDOM draw anew in each process, and cannot equal a single one.
CASES = {
    "label smoothing": lambda: ([LabelSmoothing(0.2)], None),
    "elastic net": lambda: ([ElasticNet(l1=0.05, l2=0.1, verbose=False)], None),
    "elastic net, Fuse": lambda: (
        [Fuse(verbose=False), ElasticNet(l1=0.05, l2=0.1, exclude_bias_and_norm=False, verbose=False)],
        None,
    ),
    "sam, ascent in common": lambda: ([SAM(rho=0.2, sync=True)], None),
    "asam, ascent in common": lambda: ([SAM(adaptive=True, sync=True), LabelSmoothing(0.1)], None),
    "early stopping": lambda: ([EarlyStoppingCriterion("GL", alpha=10.0, monitor="val_wrong", verbose=False)], None),
    "gradient noise": lambda: ([GradientNoise(eta=0.1)], None),
    "r-drop": lambda: ([RDrop(2.0)], Alternating()),
    "max norm": lambda: ([MaxNorm(0.3)], None),
    "activations": lambda: ([ActivationRegularization("branches.*", alpha=2.0, beta=1.0)], None),
    "sam": lambda: ([SAM(rho=0.2)], nn.Dropout(0.3)),
    "dropout": lambda: ([DropoutSchedule(linear(0.0, 1.0), verbose=False)], nn.Dropout(0.5)),
    "depth": lambda: ([StochasticDepth("branches.*", verbose=False), RDrop(1.0)], nn.Dropout(0.5)),
}
RANDOM = ("sam", "dropout", "depth")


def make_trainer(callbacks, epochs, world_size=1, **arguments):
    strategy = DDPStrategy(process_group_backend="gloo", start_method="popen") if world_size > 1 else "auto"
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return pl.Trainer(
        callbacks=callbacks,
        max_epochs=epochs,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **{**quiet, **arguments},
    )


def run(case, epochs=4, world_size=1, ckpt_path=None, more=(), **arguments):
    """Epochs of two steps of two batches."""
    callbacks, dropout = CASES[case]()
    module = Classifier(dropout)
    trainer = make_trainer([*callbacks, *more], epochs, world_size, **arguments)
    trainer.fit(module, ckpt_path=ckpt_path)
    state = trainer.optimizers[0].state_dict()["state"]
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return trainer.global_rank, dict(weights=weights, state=state, steps=trainer.global_step)


def main(folder, *cases):
    warnings.simplefilter("ignore")
    for case in cases:
        rank, result = run(case, world_size=2)
        torch.save(result, os.path.join(folder, f"{case} {rank}.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the other process has saved what it found, too
    os._exit(0)  # threads of gloo are still there; at an ordinary exit they now and then abort a process that is done
