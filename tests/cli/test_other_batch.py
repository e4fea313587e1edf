# SPDX-License-Identifier: Apache-2.0
"""`optkit doctor` on losses in which nothing of the batch is, and on those that only begin so."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.cli.doctor import doctor

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(pl.LightningModule):
    """A loss of this kind."""

    def __init__(self, kind, *, data="pairs"):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.data = kind, data
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        if kind == "satisfied":
            self.body = nn.Linear(8, 1)
            self.body.weight.data = 1e4 * torch.eye(8)[:1]
        if kind == "zero head":
            nn.init.zeros_(self.body[2].weight)
            nn.init.zeros_(self.body[2].bias)

    def training_step(self, batch, batch_idx):
        x = batch[0]
        if self.kind in ("healthy", "zero head"):
            return F.mse_loss(self.body(x).squeeze(1), batch[1])
        if self.kind in ("hinge", "satisfied"):  # after a while, or from the start
            return (1 - self.body(x).squeeze(1) * batch[1].sign()).clamp(min=0).mean()
        if self.kind == "first masked":
            return (F.mse_loss(self.body(x).squeeze(1), batch[1], reduction="none") * (batch[1] != 0)).mean()
        weights = sum(p.square().sum() for p in self.parameters())
        return weights if self.kind == "weights" else 0 * F.mse_loss(self.body(x).squeeze(1), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        y = x[:, 0] + 3 * x[:, 0].sign()
        if self.kind == "first masked":
            y[:16] = 0
        if self.data == "one batch":
            return DataLoader(TensorDataset(x, y), 64)
        if self.data == "one tensor":
            return DataLoader(TensorDataset(x), 16)
        if self.data == "numbers":
            return DataLoader(range(64), 16)
        return DataLoader(TensorDataset(x, y), 16)


def said(examination):
    return [(each.state, each.verdict.symptom) for each in examination.findings if each.verdict]


def test_a_loss_of_the_weights_alone_is_a_fault():
    examination = doctor(Net("weights"), accelerator="cpu", max_steps=64)
    assert said(examination) == [("fault", "input_ignored")]
    (verdict,) = (each.verdict for each in examination.findings if each.verdict)
    assert "weights alone" in verdict.cause and "to the last bit" in verdict.evidence


def test_a_loss_of_0_is_a_fault():
    assert said(doctor(Net("times 0"), accelerator="cpu", max_steps=64)) == [("fault", "no_gradient")]


def test_a_first_batch_without_any_loss_is_no_fault_where_the_next_has_one():
    examination = doctor(Net("first masked"), accelerator="cpu", max_steps=64)
    assert said(examination) == [] and examination.is_healthy
    (found,) = (each for each in examination.findings if each.check == "one batch")
    assert found.state == "unknown" and "to 0 in 64 steps; that of the next batch is" in found.seen


@pytest.mark.parametrize("kind", ["healthy", "zero head", "hinge", "satisfied"])
def test_a_loss_of_the_batch_is_none(kind):
    assert said(doctor(Net(kind), accelerator="cpu", max_steps=200)) == []


@pytest.mark.parametrize(
    ("data", "found"), [("one batch", []), ("numbers", []), ("one tensor", [("hint", "input_ignored")])]
)
def test_what_may_be_no_data_is_no_fault(data, found):
    examination = doctor(Net("weights", data=data), accelerator="cpu", max_steps=64)
    assert said(examination) == found and examination.is_healthy


def test_losses_in_16_bits_tell_nothing():
    examination = doctor(Net("weights").to(torch.bfloat16), accelerator="cpu", max_steps=64, precision="bf16-true")
    assert "input_ignored" not in [symptom for _, symptom in said(examination)]
