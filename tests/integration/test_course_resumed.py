# SPDX-License-Identifier: Apache-2.0
"""Every callback of the course of a run, stopped at any batch and resumed beside ExactResume, and taken off again.

Shuffled data, dropout, two batches a step and two steps an epoch: whatever a callback forgets changes the bits.
"""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import (
    BatchRegime,
    BatchSizeSchedule,
    ExactAccumulation,
    ExactResume,
    Fuse,
    GradientClipping,
    HyperparameterSchedule,
    LRSchedule,
    ParameterGroups,
    PlateauSchedule,
    ScheduleFree,
)
from lightning_optkit.clipping import AutoClip
from lightning_optkit.optimizers import ScheduleFreeAdamW
from lightning_optkit.schedules import linear, warmup_cosine

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, about checkpoints within an epoch


class Regression(pl.LightningModule):
    def __init__(self, rule=torch.optim.AdamW):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 1))
        self.rule = rule

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - batch[0].sin().sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("measured", [1.0, 1.5, 0.5, 2.0, 2.5, 0.1][self.trainer.global_step % 6])

    def configure_optimizers(self):
        return self.rule(self.parameters(), lr=0.02)


def quiet(callback, *args, **kwargs):
    return callback(*args, verbose=False, **kwargs)


CASES = {
    "LRSchedule": lambda: [quiet(LRSchedule, warmup_cosine(0.3))],
    "LRSchedule in samples": lambda: [quiet(LRSchedule, linear(), "sample")],
    "LRSchedule in epochs": lambda: [quiet(LRSchedule, linear(), "epoch")],
    "HyperparameterSchedule": lambda: [
        quiet(HyperparameterSchedule, name, linear(1.0, 0.2), interval)
        for name, interval in (("weight_decay", "step"), ("beta1", "sample"), ("dropout", "fractional_epoch"))
    ],
    "PlateauSchedule": lambda: [quiet(PlateauSchedule, "measured", patience=0, factor=0.5)],
    "BatchRegime": lambda: [BatchRegime(3)],
    "BatchRegime full": lambda: [BatchRegime("full")],
    "BatchSizeSchedule": lambda: [quiet(BatchSizeSchedule, {1: 3, 2: 4}, "linear")],
    "ExactAccumulation": lambda: [ExactAccumulation(lambda batch: (batch[0] > 0).sum())],
    "GradientClipping": lambda: [GradientClipping(AutoClip(20))],
    "ParameterGroups": lambda: [quiet(ParameterGroups, 0.3, layer_decay=0.5)],
    "ScheduleFree": lambda: [ScheduleFree()],
    "together": lambda: [
        quiet(ParameterGroups, 0.3, layer_decay=0.5),
        quiet(LRSchedule, linear(), "sample"),
        quiet(HyperparameterSchedule, "weight_decay", linear(1.0, 0.2), "sample"),
        quiet(PlateauSchedule, "measured", patience=0, factor=0.5),
        quiet(BatchSizeSchedule, {1: 3, 2: 4}, "linear"),
        GradientClipping(AutoClip(20)),
        ExactAccumulation(),
        quiet(Fuse),
    ],
}
PLACES = {"a step's end": (0, 1), "inside a window": (1, 0), "a last batch": (1, -1), "an epoch's end": (0, "end")}
# Lightning leaves out the validation behind a last batch, so a checkpoint from in between misses its measurement.
MISSES_ONE = [("PlateauSchedule", "a last batch"), ("together", "a last batch")]


class SaveAt(pl.Callback):
    def __init__(self, path, where):
        self.path, self.where = path, where

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        epoch, place = self.where
        last = trainer.num_training_batches - 1
        if trainer.current_epoch == epoch and batch_idx == (last if place == -1 else place):
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, pl_module):
        if (trainer.current_epoch, "end") == self.where:
            trainer.save_checkpoint(self.path)


def fit(case, *callbacks, ckpt_path=None):
    """What is left of three epochs of eight samples, two at a time if no callback says otherwise."""
    module = Regression(ScheduleFreeAdamW if case == "ScheduleFree" else torch.optim.AdamW)
    torch.manual_seed(1 if ckpt_path is None else 99)
    trainer = pl.Trainer(
        callbacks=[*CASES[case](), *callbacks],
        max_epochs=3,
        accumulate_grad_batches=1 if case == "BatchRegime full" else 2,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.randn(8, 4, generator=torch.Generator().manual_seed(2)))
    trainer.fit(module, DataLoader(data, 2, shuffle=True), DataLoader(data, 8), ckpt_path=ckpt_path)
    state = trainer.optimizers[0].state_dict()
    return trainer, module, {"weights": module.state_dict(), "state": state["state"], "groups": state["param_groups"]}


@pytest.mark.parametrize(
    ("case", "place"), [(case, place) for case in CASES for place in PLACES if (case, place) not in MISSES_ONE]
)
def test_resumed_equals_uninterrupted(tmp_path, frozen, case, place):
    path = tmp_path / "saved.ckpt"
    *_, whole = fit(case, ExactResume(), SaveAt(path, PLACES[place]))
    trainer, _, resumed = fit(case, ExactResume(), ckpt_path=path)
    assert trainer.global_step >= 3
    assert frozen(resumed) == frozen(whole)


class Broken(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1:
            raise ZeroDivisionError


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("breaks", [False, True])
def test_module_trainer_and_loops_are_as_they_were(case, breaks):
    made = []

    class Keep(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            made.append((trainer, pl_module))

    if breaks:
        with pytest.raises(ZeroDivisionError):
            fit(case, ExactResume(), Keep(), Broken())
    else:
        fit(case, ExactResume(), Keep())
    trainer, module = made[0]
    control = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    lightnings = {"_hparams", "_metric_attributes"}
    assert vars(module).keys() - vars(Regression()).keys() <= lightnings
    assert module.net[1].p == 0.4
    loops = lambda trainer: [trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop]  # noqa: E731
    for loop, untouched in zip(loops(trainer), loops(control), strict=True):
        assert vars(loop).keys() == vars(untouched).keys()
    assert trainer.accumulate_grad_batches == (1 if case == "BatchRegime full" else 2)
    assert trainer.train_dataloader.batch_size == trainer.train_dataloader.batch_sampler.batch_size == 2
