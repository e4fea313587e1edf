# SPDX-License-Identifier: Apache-2.0
"""LRSchedule beside something that writes the rate too: it is overwritten, and said once; a new base is not."""

import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lr_schedule_cases import LR, quiet, sgd

from lightning_optkit.callbacks import LRFinder, LRSchedule, PlateauSchedule
from lightning_optkit.schedules import constant, cosine, linear

pytestmark = pytest.mark.filterwarnings("ignore:You (defined|passed in) a .*Skipping val loop")
TEXT = "the schedule writes it"


class Writes(pl.Callback):
    """Sets the rate in a hook, from the second epoch on."""

    def __init__(self, hook, rate=0.7):
        self.rate = rate
        setattr(self, hook, self._write)

    def _write(self, trainer, *_):
        if trainer.current_epoch > 0:
            trainer.optimizers[0].param_groups[-1]["lr"] = self.rate


@pytest.mark.parametrize("is_first", [False, True], ids=["behind the schedule", "before it"])
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_end", "on_before_optimizer_step"])
def test_a_rate_that_is_written_by_something_else_is_said_once(regression, warned, recorder, hook, is_first):
    callbacks = [quiet(constant()), Writes(hook)]
    schedule = callbacks[0]
    for _ in range(2):  # once in each fit
        said = warned(TEXT, regression(sgd), *(reversed(callbacks) if is_first else callbacks), recorder)
        assert said == [
            f"{type(schedule).__name__}: something else has set the lr of a group of SGD to 0.7, and it is {LR:.3g} "
            "again: the schedule writes it at every step. Keep one of the two."
        ]
    if hook != "on_before_optimizer_step":  # as written, it is not kept
        assert set(recorder.values("lr")) == {LR}


class Pretrained(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.backbone(batch[0])).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=LR)


@pytest.mark.parametrize("is_first", [False, True], ids=["behind the schedule", "before it"])
def test_the_rates_of_backbone_finetuning_are_said_not_to_be_kept(warned, is_first):
    callbacks = [quiet(constant()), BackboneFinetuning(1)]
    said = warned(TEXT, Pretrained(), *(reversed(callbacks) if is_first else callbacks), epochs=4)
    assert len(said) == 1
    assert re.search(r"something else \(BackboneFinetuning\?\) has set the lr of a group of SGD to 0\.02, and", said[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: [],
        lambda: [PlateauSchedule("train_loss", patience=0, factor=0.5, verbose=False, threshold=1e9)],
        lambda: [LRFinder(num_steps=20, verbose=False)],
    ],
    ids=["alone", "PlateauSchedule", "LRFinder"],
)
@pytest.mark.parametrize("schedule", [constant(), linear(), cosine()], ids=lambda schedule: schedule.name)
def test_what_changes_the_base_is_not_said(regression, warned, schedule, make):
    assert warned(TEXT, regression(sgd), LRSchedule(schedule, verbose=False), *make()) == []
