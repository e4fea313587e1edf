# SPDX-License-Identifier: Apache-2.0
"""The arguments of callbacks, as plans and pages show them: those that were given."""

import lightning.pytorch as pl
import pytest
import torch

import lightning_optkit as ok
from lightning_optkit.callbacks.seams.run_settings import callback_arguments, run_settings

GIVEN = {
    "ParameterGroups": (lambda: ok.ParameterGroups(weight_decay=0.1), "weight_decay=0.1"),
    "Initialize": (lambda: ok.Initialize(ok.init.he), "scheme=he"),
    "PlateauSchedule": (lambda: ok.PlateauSchedule("val_loss", factor=0.2), "monitor='val_loss', factor=0.2"),
    "LRSchedule": (lambda: ok.LRSchedule(ok.schedules.constant(), interval="epoch"), "interval='epoch'"),
    "DropoutSchedule": (lambda: ok.DropoutSchedule(ok.schedules.constant(), total=9), "total=9"),
    "GSAM": (lambda: ok.GSAM(rho=0.1), "rho=0.1"),
    "Fuse": (lambda: ok.Fuse(verbose=False), ""),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_was_given_is_shown(make_trainer, name):
    make, shown = GIVEN[name]
    found = callback_arguments(make_trainer(make()), but=None)[name]
    assert found.endswith(shown) and (shown or not found) and repr(make()) == f"{name}({found})"


@pytest.mark.filterwarnings("ignore:You defined a .validation_step")
def test_the_rate_of_an_optimizer_is_the_one_that_its_schedule_multiplies(make_trainer, regression, data):
    class Cycled(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.shown = run_settings(trainer, pl_module)["optimizer"]

    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)]

    make_trainer(cycled := Cycled()).fit(regression(configure), data(4))
    assert cycled.shown.startswith("SGD(lr=0.5")
