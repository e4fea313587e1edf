# SPDX-License-Identifier: Apache-2.0
"""Optimizers beside others that are stepped without any gradient, and those that only look like it."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import Fuse, GradientHealth
from lightning_optkit.cli.doctor import doctor

pytestmark = pytest.mark.filterwarnings("ignore")
WAITS = 36  # steps: none that is measured


class Gan(pl.LightningModule):
    """Two networks with an optimizer each, in this order; a kind of fault, or of what is healthy."""

    def __init__(self, kind="", *, first="generator"):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization, self.kind, self.order, self.said = False, kind, first, []
        self.waits = WAITS
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        if self.kind == "waits":
            self.said.append([each.symptom for each in self.health.verdicts])
        optimizers = self.optimizers()
        by_generator, by_discriminator = optimizers if self.order == "generator" else reversed(optimizers)
        real = batch[0]
        noise = torch.randn(len(real), 4)
        if self.kind == "one forward":
            with torch.no_grad():
                fake = self.generator(noise)
        else:
            fake = self.generator(noise)
        is_cut = self.kind in ("detached", "frozen") or (self.kind == "waits" and batch_idx < self.waits)
        self._generate(by_generator, fake, is_cut, batch_idx)
        self._discriminate(by_discriminator, real, fake.detach(), batch_idx)

    def _generate(self, optimizer, fake, is_cut, batch_idx):
        if self.kind == "rare" and batch_idx % 5:
            return
        if self.kind == "frozen":
            self.generator.requires_grad_(False)
        self.toggle_optimizer(optimizer) if self.kind == "toggled" else None
        scores = self.discriminator(fake.detach() if is_cut else fake)
        loss = F.softplus(-scores).mean()
        if self.kind == "nothing":
            loss = loss.detach().requires_grad_()
        if self.kind == "accumulated":
            loss = loss / 4
        optimizer.zero_grad() if self.kind != "accumulated" or batch_idx % 4 == 0 else None
        self.manual_backward(loss)
        if self.kind != "accumulated" or batch_idx % 4 == 3:
            optimizer.step()
        self.generator.requires_grad_(True)
        self.untoggle_optimizer(optimizer) if self.kind == "toggled" else None

    def _discriminate(self, optimizer, real, fake, batch_idx):
        if self.kind == "late" and batch_idx < WAITS:
            return
        factor = 0.0 if self.kind == "factor" else 1.0  # as where a discriminator begins later
        optimizer.zero_grad()
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()
        self.manual_backward(factor * loss if self.kind != "nothing" else loss.detach().requires_grad_())
        optimizer.step()

    def configure_optimizers(self):
        made = [torch.optim.Adam(each.parameters(), lr=1e-3) for each in (self.generator, self.discriminator)]
        return made if self.order == "generator" else made[::-1]

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(256, 8, generator=torch.Generator().manual_seed(1))), 4)


class Turns(Gan):
    """Of two tasks each batch has one; both optimizers are stepped."""

    def training_step(self, batch, batch_idx):
        net = self.generator if batch_idx % 2 else self.discriminator
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(net(batch[0][:, : net[0].in_features]).square().mean())
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.fixture
def diagnose(make_trainer):
    def run(module, *callbacks):
        module.health = GradientHealth(check_every=50, verbose=False)
        make_trainer(module.health, *callbacks, epochs=1, accumulate_grad_batches=1).fit(module)
        assert not module.health._guard.failed
        return module.health.verdicts

    return run


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first", ["generator", "discriminator"])
@pytest.mark.parametrize("kind", ["detached", "one forward"])
def test_an_optimizer_without_any_gradient_is_named_by_its_last_layer(diagnose, kind, first, fused):
    (verdict,) = diagnose(Gan(kind, first=first), *([Fuse(verbose=False)] if fused else []))
    assert (verdict.symptom, verdict.layer) == ("no_gradient", "generator.2")
    assert "generator.0.weight, generator.0.bias, generator.2.weight and 1 more" in verdict.evidence
    assert "no parameter of its optimizer" in verdict.cause and "the output of generator.2 anew" in verdict.remedy


@pytest.mark.parametrize("kind", ["", "rare", "accumulated", "toggled", "late", "factor", "frozen"])
@pytest.mark.parametrize("first", ["generator", "discriminator"])
def test_one_that_is_stepped_later_or_rarely_or_is_frozen_is_healthy(diagnose, kind, first):
    assert diagnose(Gan(kind, first=first)) == []


def test_where_no_optimizer_has_a_gradient_none_is_named(diagnose):
    assert [each.layer for each in diagnose(Gan("nothing"))] in ([], [None])


def test_tasks_in_turn_are_healthy(diagnose):
    assert diagnose(Turns()) == []


def test_it_is_withdrawn_once_a_gradient_arrives(diagnose):
    module = Gan("waits", first="discriminator")
    assert diagnose(module) == []
    assert module.said[WAITS] == ["no_gradient"] and module.said[WAITS + 1] == []


def test_the_doctor_says_it_too():
    examination = doctor(Gan("detached"), max_steps=64, accelerator="cpu")
    (fault,) = [each for each in examination.findings if each.state == "fault"]
    assert (fault.verdict.symptom, fault.verdict.layer) == ("no_gradient", "generator.2")
    assert not [each for each in doctor(Gan(), max_steps=64, accelerator="cpu").findings if each.state == "fault"]


def test_hooks_go_with_the_first_gradient(make_trainer):
    left = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            left.append(len(health._vain._handles))

    health = GradientHealth(check_every=50, verbose=False)
    make_trainer(health, Look(), epochs=1, accumulate_grad_batches=1).fit(Gan("late"))
    assert left[0] == left[WAITS] == 1 and left[50] == 0


def test_hooks_that_follow_are_called(diagnose):
    called = []

    class Hooked(Gan):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                for each in self.trainer.optimizers:
                    each.register_step_pre_hook(lambda *args: called.append("before"))
                    each.register_step_post_hook(lambda *args: called.append("after"))
            super().training_step(batch, batch_idx)

    assert diagnose(Hooked()) == []
    assert called == ["before", "after"] * 128


class SelfClearing(torch.optim.SGD):
    """Clears the gradients as it goes."""

    def step(self, closure=None):
        super().step(closure)
        self.zero_grad(set_to_none=True)


def test_an_optimizer_that_clears_its_gradients_itself_is_healthy(diagnose):
    module = Gan()
    module.configure_optimizers = lambda: [SelfClearing(each.parameters(), 0.01) for each in module.children()]
    assert diagnose(module) == []


def test_one_that_joins_in_the_first_quarter_is_healthy(diagnose):
    module = Gan("waits", first="discriminator")
    module.waits = 15
    assert diagnose(module) == [] and not any(module.said)
