# SPDX-License-Identifier: Apache-2.0
"""Modules with one optimizer that step it, and its scheduler, themselves: what they leave out, and what they may."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from gradient_health_cases import loader
from torch import nn

from lightning_optkit.callbacks import GradientHealth

pytestmark = pytest.mark.filterwarnings("ignore")


class ByHand(pl.LightningModule):
    """A kind of step."""

    def __init__(self, kind=""):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization, self.kind, self.said, self.steps = False, kind, [], 0
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
        if kind == "in the backward pass":
            for p in self.net.parameters():
                p.register_post_accumulate_grad_hook(self.step_now)
        if kind == "frozen":
            self.net.requires_grad_(False)

    @staticmethod
    @torch.no_grad()
    def step_now(p):
        p.sub_(0.1 * p.grad)
        p.grad = None

    def training_step(self, batch, batch_idx):
        self.said.append([each.symptom for each in self.health.verdicts])
        optimizer, loss = self.optimizers(), F.cross_entropy(self.net(batch[0]), batch[1])
        self.steps += 1
        if self.kind == "closure":
            optimizer.step(lambda: self.cleared(optimizer, batch))
            optimizer.zero_grad()
            return
        optimizer.zero_grad()
        if self.kind == "evolution":
            with torch.no_grad():
                self.net[2].bias.add_(0.01 * torch.randn(10))
        elif self.kind == "torch's":
            loss.backward()
        elif self.kind not in ("forgotten", "frozen") and (self.kind != "waits" or self.steps > 30):
            self.manual_backward(loss)
        if self.kind == "cleared":
            optimizer.zero_grad()
        if self.kind != "rare" or self.steps % 16 == 0:
            optimizer.step()

    def cleared(self, optimizer, batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        loss.backward()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def diagnose(make_trainer):
    def run(module, epochs=4):
        module.health = GradientHealth(check_every=50, verbose=False)
        make_trainer(module.health, epochs=epochs, accumulate_grad_batches=1).fit(module, loader())
        assert not module.health._guard.failed
        return module.health.verdicts

    return run


def test_a_backward_pass_that_is_left_out_is_named(diagnose):
    module = ByHand("forgotten")
    (verdict,) = diagnose(module)
    assert (verdict.symptom, verdict.layer, verdict.confidence) == ("no_gradient", None, 1.0)
    assert "manual_backward(loss)" in verdict.remedy and "backward pass" in verdict.cause
    assert f"{module.steps} steps so far" in verdict.evidence
    assert module.said[19] == [] and module.said[20] == ["no_gradient"]


def test_one_that_begins_later_withdraws_it(diagnose):
    module = ByHand("waits")
    assert diagnose(module) == []
    assert module.said[30] == ["no_gradient"] and module.said[31] == []


@pytest.mark.parametrize("kind", ["", "rare", "closure", "evolution", "torch's", "in the backward pass", "frozen"])
def test_other_steps_without_a_gradient_behind_them_are_none(diagnose, kind):
    module = ByHand(kind)
    diagnose(module)
    assert not any("no_gradient" in said for said in [*module.said, [each.symptom for each in module.health.verdicts]])


def test_gradients_that_are_cleared_are_another_fault(diagnose):
    assert [each.symptom for each in diagnose(ByHand("cleared"))] == ["not_optimized"]


class Scheduled(ByHand):
    """Its scheduler is stepped from some epoch on, or never."""

    since = 5

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def on_train_epoch_end(self):
        if self.current_epoch >= self.since:
            self.lr_schedulers().step()


def test_a_scheduler_that_is_stepped_later_withdraws_that_it_is_not(diagnose):
    module = Scheduled()
    assert diagnose(module, epochs=8) == []
    batches = len(loader())
    assert module.said[3 * batches] == ["schedule_fault"] and module.said[7 * batches] == []


def test_one_that_never_is_stays_named(diagnose):
    module = Scheduled()
    module.since = 99
    (verdict,) = diagnose(module, epochs=8)
    assert (verdict.symptom, verdict.confidence) == ("schedule_fault", 1.0)
    assert "no step of the scheduler" in verdict.evidence
