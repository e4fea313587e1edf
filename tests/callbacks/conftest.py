# SPDX-License-Identifier: Apache-2.0
"""A small module and a real Trainer: two batches per step and two steps per epoch, so that none of the counts agree."""

import logging
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_utilities.core import rank_zero
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))  # gradient_health_cases.py, average_cases.py

import gradient_health_cases

from lightning_optkit.callbacks import GradientHealth


class Regression(pl.LightningModule):
    """`configure(module)` is its configure_optimizers; the loss of the batches in `poisoned` is infinite.

    Args:
        configure: Called with the module.
        poisoned: Pairs of epoch and batch.
    """

    def __init__(self, configure, poisoned=()):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.configure, self.poisoned = configure, poisoned

    def forward(self, x):
        return self.net(x)

    def configure_optimizers(self):
        return self.configure(self)

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x.to(self.dtype)).float(), y.float())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss * float("inf") if (self.current_epoch, batch_idx) in self.poisoned else loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


def loader(batch_size=2):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def precision_of(name):
    """Trainer arguments. By name, Lightning turns 16-mixed on CPU into bf16-mixed."""
    if name != "16-mixed":
        return dict(precision=name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return dict(plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])


@pytest.fixture
def regression():
    """The module class Regression(configure, poisoned=())."""
    return Regression


@pytest.fixture
def make_trainer(tmp_path):
    """make_trainer(*callbacks, epochs, precision, **trainer_arguments): a quiet Trainer on CPU."""

    def make(*callbacks, epochs=3, precision="32-true", **kwargs):
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        return pl.Trainer(
            callbacks=list(callbacks),
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=tmp_path,
            **{"accumulate_grad_batches": 2, "limit_val_batches": 0, **quiet, **precision_of(precision), **kwargs},
        )

    return make


@pytest.fixture
def fit(make_trainer):
    """fit(module, *callbacks, epochs, ckpt_path, **trainer_arguments): the Trainer, after the fit."""

    def fit_(module, *callbacks, ckpt_path=None, **kwargs):
        trainer = make_trainer(*callbacks, **kwargs)
        trainer.fit(module, loader(), loader(4), ckpt_path=ckpt_path)
        return trainer

    return fit_


@pytest.fixture
def warned(fit):
    """warned(text, ...): the messages with that text of warnings in `fit(...)`."""

    def warned_(text, *args, **kwargs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(*args, **kwargs)
        return [str(each.message) for each in caught if text in str(each.message)]

    return warned_


@pytest.fixture
def data():
    """data(batch_size): the loader that `fit` uses."""
    return loader


@pytest.fixture
def printed(caplog):
    """printed(): the messages of Lightning's rank-zero logger so far."""
    rank_zero.log.addHandler(caplog.handler)
    level = rank_zero.log.level
    rank_zero.log.setLevel(logging.INFO)
    yield lambda: "\n".join(record.getMessage() for record in caplog.records)
    rank_zero.log.setLevel(level)
    rank_zero.log.removeHandler(caplog.handler)


class StepRecorder(pl.Callback):
    """The groups at each optimizer step: `steps[optimizer]` has, per step, a copy of all group entries."""

    def __init__(self):
        self.steps = {}

    def on_train_start(self, trainer, pl_module):
        for place, optimizer in enumerate(trainer.optimizers):
            optimizer.register_step_post_hook(lambda optimizer, *_, place=place: self.record(place, optimizer))

    def record(self, place, optimizer):
        copies = [
            {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]
        self.steps.setdefault(place, []).append(copies)

    def values(self, key, group=0, optimizer=0):
        """The entry of a group, step by step."""
        return [step[group][key] for step in self.steps[optimizer]]


@pytest.fixture
def recorder():
    """A StepRecorder, to pass to `fit` as a callback."""
    return StepRecorder()


@pytest.fixture
def diagnose(make_trainer):
    """diagnose(module, *callbacks, data, **trainer_arguments): the verdicts after a fit."""

    def run(module, *callbacks, data=None, **kwargs):
        health = GradientHealth(verbose=False)
        arguments = {"epochs": 3, "accumulate_grad_batches": 1, **kwargs}
        make_trainer(health, *callbacks, **arguments).fit(module, data or gradient_health_cases.loader())
        return health.verdicts

    return run
