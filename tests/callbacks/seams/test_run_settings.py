# SPDX-License-Identifier: Apache-2.0
"""The arguments of callbacks, as plans and pages show them: those that were given."""

import pytest

import lightning_optkit as ok
from lightning_optkit.callbacks.seams.run_settings import callback_arguments

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
    assert found.endswith(shown) and (shown or not found)
