# SPDX-License-Identifier: Apache-2.0
"""Trains a setup with GradientHealth, and scores it."""

import logging
import tempfile
import warnings

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok

QUIET = dict(
    logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accelerator="cpu"
)  # fmt: skip


class Module(pl.LightningModule):
    """A setup as a user would write it."""

    def __init__(self, setup):
        super().__init__()
        self.setup_of_run = setup
        self.body, self.head = setup.body, setup.head
        self.automatic_optimization = not setup.manual

    def forward(self, x):
        return self.setup_of_run.forward(self.body, self.head, x)

    def training_step(self, batch, batch_idx):
        setup = self.setup_of_run
        x, y = batch
        loss = setup.loss(self(x), setup.target(y))
        if setup.manual:
            optimizer = self.optimizers()
            if setup.zeroes:
                optimizer.zero_grad() if setup.manual_zero is None else setup.manual_zero(optimizer)
            self.manual_backward(loss)
            optimizer.step()
        if setup.steps_scheduler:
            self.lr_schedulers().step()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.setup_of_run.loss(self(batch[0]), self.setup_of_run.target(batch[1])))

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if self.setup_of_run.zeroes:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_train_start(self):
        if self.setup_of_run.at_start is not None:
            self.setup_of_run.at_start(self)

    def configure_optimizers(self):
        setup = self.setup_of_run
        params, decay = setup.optimized(self), setup.weight_decay
        if setup.optimizer == "sgd":
            optimizer = torch.optim.SGD(params, setup.lr, momentum=0.9)
        elif setup.optimizer == "sgd_plain":
            optimizer = torch.optim.SGD(params, 4 * setup.lr)
        elif setup.optimizer == "adam":
            optimizer = torch.optim.Adam(params, setup.lr)
        elif setup.optimizer == "ok.adamw":
            optimizer = ok.AdamW(params, setup.lr, weight_decay=decay, **setup.stages)
        else:
            optimizer = torch.optim.AdamW(params, setup.lr, weight_decay=decay)
        if setup.schedule is None:
            return optimizer
        scheduler = setup.schedule(optimizer, setup.steps_per_epoch * setup.epochs, setup.epochs)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def train(setup, *callbacks):
    """Fits it, and returns the module."""
    x, y, x_val, y_val = setup.data
    generator = torch.Generator().manual_seed(setup.seed)
    order = {"shuffle": True} if setup.sampler is None else {"sampler": setup.sampler(y)}
    train_set = DataLoader(TensorDataset(x, y), setup.batch_size, generator=generator, **order)
    val_set = DataLoader(TensorDataset(x_val, y_val), 512)
    fuse = [ok.Fuse(verbose=False)] if setup.optimizer == "fuse" else []
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        module = Module(setup)
        trainer = pl.Trainer(
            max_epochs=setup.epochs,
            callbacks=[*setup.callbacks, *fuse, *callbacks],
            default_root_dir=folder,
            **{"num_sanity_val_steps": 0, **QUIET, **setup.trainer},
        )
        trainer.fit(module, train_set, val_set)
    return module


@torch.no_grad()
def score(setup, module):
    """What it learned of what can be learned, on validation data: 0 for a constant guess, 1 for no errors."""
    module.eval()
    _, y, x, y_val = setup.data
    out = module(x.to(module.dtype) if x.is_floating_point() else x).float()
    target = setup.target(y_val)
    if not bool(out.isfinite().all()):
        return 0.0
    if setup.kind == "regression":
        out = out.reshape(target.shape)  # one column, or none
        constant = setup.target(y).float().mean(0)
        return float(1 - (out - target).square().mean() / (constant - target).square().mean())
    guess = out.argmax(1) if setup.kind == "classes" and out.ndim == 2 else (out > 0).long()
    accuracy = float((guess == y_val.long()).float().mean())
    majority = float((y_val.long() == y.long().mode().values).float().mean())
    return (accuracy - majority) / (1 - majority)


def diagnosed(setup, check_every=100):
    """(verdicts, score) of a run."""
    verdicts, module = fitted(setup, check_every)
    return verdicts, score(setup, module)


def fitted(setup, check_every=100):
    """(verdicts, module) of a run."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        if setup.prepare is not None:
            setup.prepare(setup)
        health = ok.GradientHealth(check_every, verbose=False)
        torch.manual_seed(setup.seed)
        module = train(setup, health)
        if health._guard.failed:  # which would look like silence
            raise RuntimeError(f"{setup.family}, seed {setup.seed}: {health._guard.failed}")
    finally:
        log.setLevel(level)
    return health.verdicts, module
