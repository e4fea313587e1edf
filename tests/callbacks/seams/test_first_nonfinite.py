# SPDX-License-Identifier: Apache-2.0
"""Where a number that is not finite came from, if several processes step on the mean of their gradients."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from lightning_optkit.callbacks.seams.first_nonfinite import first_nonfinite
from lightning_optkit.diagnostics._observations import Losses


def seen_by(world_size, weight):
    module = pl.LightningModule()
    module.layer, module.automatic_optimization = torch.nn.Linear(2, 1), False
    torch.nn.init.constant_(module.layer.weight, weight)
    trainer = SimpleNamespace(world_size=world_size, precision_plugin=None)
    return first_nonfinite(trainer, module, torch.ones(1, 2), 0, 7, Losses())


@pytest.mark.parametrize(("world_size", "where"), [(1, "gradient"), (2, "process")])
def test_weights_that_a_step_broke_may_be_the_fault_of_another_process(world_size, where):
    found = seen_by(world_size, float("nan"))
    assert (found.step, found.where, found.layer) == (6, where, "layer")


def test_a_process_speaks_of_its_own_weights_alone():
    assert seen_by(1, 1.0).detail.endswith("the batch and all weights are finite")
    assert seen_by(2, 1.0).detail.endswith("the batch and all weights that this process has are finite")
