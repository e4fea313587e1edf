# SPDX-License-Identifier: Apache-2.0
"""Real runs with a loss that is flat: `GradientHealth` says so until a gradient arrives."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import Fuse, GradientHealth

pytestmark = pytest.mark.filterwarnings("ignore:.*GradientHealth.*")
WAITS = 40  # steps


class Net(pl.LightningModule):
    """Regresses the sum of two features by a loss of this kind."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.said = kind, []
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        if kind in ("hinge", "ranking"):
            self.body = nn.Linear(8, 1)
            nn.init.zeros_(self.body.weight)
            self.body.weight.data[0, :2] = 1e4

    def training_step(self, batch, batch_idx):
        x, y = batch
        out, none = self.body(x).squeeze(1), torch.zeros(len(x), dtype=torch.bool)
        return getattr(self, "_" + self.kind)(out, y, none)

    def _times_0(self, out, y, none):
        return 0 * F.mse_loss(out, y)

    def _masked(self, out, y, none):
        return (F.mse_loss(out, y, reduction="none") * none).sum() / none.sum().clamp(min=1)

    def _selected(self, out, y, none):
        return (out[none] - y[none]).square().sum()

    def _value(self, out, y, none):
        return F.mse_loss(out, y).detach() + 0 * out.sum()

    def _rounded(self, out, y, none):
        return F.mse_loss(out.round(), y)

    def _hinge(self, out, y, none):
        return (1 - out * y.sign()).clamp(min=0).mean()

    def _perfect(self, out, y, none):
        return F.mse_loss(out, out.detach() + 0 * y)

    def _ranking(self, out, y, none):
        return F.margin_ranking_loss(out[:2], out[2:], (y[:2] - y[2:]).sign())  # 0 for weights of 0 as well

    def _rare_labels(self, out, y, none):
        return (self.global_step % 16 == 9) * F.mse_loss(out, y)  # in none of the measured steps

    def _waits(self, out, y, none):
        self.said.append([each.symptom for each in self.health.verdicts])
        return (self.global_step >= WAITS) * F.mse_loss(out, y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x[:, 0] + x[:, 1]), 4)


@pytest.fixture
def diagnose(make_trainer):
    def run(module, *callbacks, **kwargs):
        module.health = GradientHealth(check_every=50, verbose=False)
        make_trainer(module.health, *callbacks, epochs=4, accumulate_grad_batches=1, **kwargs).fit(module)
        return module.health.verdicts

    return run


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["times_0", "masked", "selected", "value", "rounded"])
def test_a_loss_that_is_flat_is_no_gradient(diagnose, kind, fused):
    (verdict,) = diagnose(Net(kind), *([Fuse(verbose=False)] if fused else []))
    assert (verdict.symptom, verdict.layer) == ("no_gradient", None)
    assert ("whatever the weights are" in verdict.cause) == (kind in ("times_0", "masked", "selected"))


@pytest.mark.parametrize("kind", ["hinge", "perfect", "ranking", "rare_labels"])
def test_samples_that_are_right_from_the_start_or_have_no_label_are_no_fault(diagnose, kind):
    assert diagnose(Net(kind)) == []


def test_it_is_withdrawn_once_a_gradient_arrives(diagnose):
    module = Net("waits")
    assert diagnose(module) == []
    assert module.said[WAITS] == ["no_gradient"] and module.said[-1] == []


def test_weights_are_those_of_the_run_without_it(make_trainer, frozen):
    states = []
    for callbacks in ([], [GradientHealth(verbose=False)]):
        module = Net("masked")
        make_trainer(*callbacks, epochs=2, accumulate_grad_batches=1).fit(module)
        states.append(frozen(module.state_dict()))
    assert states[0] == states[1]
