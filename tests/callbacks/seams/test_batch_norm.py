# SPDX-License-Identifier: Apache-2.0
"""Batches without a first item, for the recomputed statistics of BatchNorm: a module that takes them, or a sentence."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import WeightAveraging

pytestmark = pytest.mark.filterwarnings("ignore")


class OfDicts(pl.LightningModule):
    def __init__(self, takes):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 1))
        self.takes, self.steps = takes, 0

    def forward(self, x):
        return self.net(x[self.takes] if self.takes else x)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.net(batch["x"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, **kwargs):
    data = DataLoader(
        [{"x": row} for row in torch.randn(8, 4, generator=torch.Generator().manual_seed(0))], batch_size=4
    )
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    averaging = WeightAveraging(EMA(0.5), **kwargs)
    pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[averaging], **quiet).fit(module, data)


@pytest.mark.parametrize("takes", [None, "y"], ids=["a tensor", "another key"])
def test_a_forward_that_fails_on_a_batch_is_refused_before_the_first_step(takes):
    module = OfDicts(takes)
    with pytest.raises(
        ValueError, match=r"^WeightAveraging\(update_bn=True\): OfDicts.forward .*a dict, and fails on it"
    ):
        fit(module, update_bn=True)
    assert module.steps == 0


def test_a_forward_that_takes_it_is_not_disturbed():
    torch.manual_seed(0)
    module = OfDicts("x")
    torch.manual_seed(0)
    fit(module, update_bn=True)
    assert module.steps == 4 and module.net[1].num_batches_tracked == 2, "the statistics are those of one pass"


def test_without_update_bn_nobody_asks():
    module = OfDicts(None)
    fit(module)
    assert module.steps == 4


def test_without_batch_norm_nobody_asks():
    module = OfDicts(None)
    module.net[1] = torch.nn.Identity()
    fit(module, update_bn=True)
    assert module.steps == 4
