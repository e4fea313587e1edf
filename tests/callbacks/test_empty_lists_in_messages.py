# SPDX-License-Identifier: Apache-2.0
"""Messages that list what there is say so plainly where there is nothing."""

import re

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_optkit.callbacks import ActivationRegularization, HyperparameterSchedule, StochasticDepth
from lightning_optkit.callbacks.seams.batch_fields import field_of
from lightning_optkit.callbacks.seams.named_modules import modules_named
from lightning_optkit.schedules import cosine

pytestmark = pytest.mark.filterwarnings("ignore")


class Bare(pl.LightningModule):
    """No submodules, and no optimizer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def training_step(self, batch, batch_idx):
        return (batch @ self.weight).square().mean()

    def configure_optimizers(self):
        return None


@pytest.mark.parametrize(
    "callback",
    [
        lambda: ActivationRegularization("net"),
        lambda: StochasticDepth("net"),
        lambda: HyperparameterSchedule("momentum", cosine(), verbose=False),
    ],
    ids=["ActivationRegularization", "StochasticDepth", "HyperparameterSchedule"],
)
def test_of_a_module_that_has_nothing(make_trainer, callback):
    with pytest.raises(ValueError) as error:
        make_trainer(callback()).fit(Bare(), torch.utils.data.DataLoader(torch.ones(4, 4)))
    message = str(error.value)
    assert not re.search(r"(are|has|of|as) ?[,.;:]|(are|has|of|as) *$|, \.\.\.$|has \.", message), message
    assert re.search(r"no submodules|nothing that can be scheduled", message), message


@pytest.mark.parametrize(
    ("num", "end"), [(1, "there are 0."), (8, "5, 6, 7."), (9, "5, 6, 7, ...."), (0, "no submodules.")]
)
def test_dots_stand_for_what_is_left_out(num, end):
    net = nn.Sequential(*(nn.Identity() for _ in range(num)))
    with pytest.raises(ValueError, match=re.escape(end) + "$"):
        modules_named("Owner", "names", net, "other")


def test_a_batch_of_nothing():
    with pytest.raises((ValueError, KeyError, TypeError), match="of nothing"):
        field_of("Owner", "field", {}, ("x",))
