# SPDX-License-Identifier: Apache-2.0
"""Real runs, broken one by one: the verdict names the fault, its place and step, and the run itself is not changed."""

import copy
import json
import random
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, GradientHealth, LRFinder, ReleaseGradients, WeightAveraging
from lightning_optkit.callbacks.seams.measured_steps import MeasuredSteps
from lightning_optkit.callbacks.seams.probe import Probe
from lightning_optkit.optimizers import SGD, AdamW
from tests.workers import launch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GradientHealth.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


class Classifier(pl.LightningModule):
    """Body and head; tests override parts of it."""

    optimizer = staticmethod(torch.optim.SGD)

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1))
            self.head = nn.Linear(16, 3)

    def hidden(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.hidden(batch[0])), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.05)


def loader(poison=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    if poison is not None:
        x[poison] = float("nan")
    return DataLoader(TensorDataset(x, x[:, :3].nan_to_num().argmax(1)), batch_size=4)


@pytest.fixture
def diagnose(make_trainer):
    """diagnose(module, *callbacks, data, **trainer_arguments): the verdicts after a fit."""

    def run(module, *callbacks, data=None, **kwargs):
        health = GradientHealth(verbose=False)
        arguments = {"epochs": 3, "accumulate_grad_batches": 1, **kwargs}
        make_trainer(health, *callbacks, **arguments).fit(module, data or loader())
        return health.verdicts

    return run


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, AdamW])
def test_a_healthy_run_has_none(diagnose, optimizer, precision, accumulated):
    torch.manual_seed(0)  # of the dropout
    module = Classifier()
    module.optimizer = optimizer
    assert diagnose(module, precision=precision, accumulate_grad_batches=accumulated) == []


@pytest.mark.parametrize(
    "beside",
    [lambda: Fuse(verbose=False), ReleaseGradients, lambda: LRFinder(num_steps=20, apply=False, verbose=False)],
)
def test_a_healthy_run_beside_others_has_none(diagnose, beside):
    torch.manual_seed(0)  # of the dropout
    module = Classifier()
    module.optimizer = SGD
    assert diagnose(module, beside()) == []


@pytest.mark.parametrize("rate", [0.05, 1e-5])
@pytest.mark.parametrize("fused", [False, True])
def test_the_run_is_the_same_bit_for_bit(make_trainer, monkeypatch, frozen, fused, rate):
    """Also with probes, which run `training_step` again, with dropout, batch norms and `spectral_norm`."""
    weights, probes = [], []
    original = Probe.measure
    monkeypatch.setattr(Probe, "measure", lambda self, *args: probes.append(original(self, *args)) or probes[-1])
    for watched in (False, True):
        module, beside = Classifier(), [Fuse(verbose=False)] if fused else []
        module.body.append(nn.BatchNorm1d(16))
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(module.body[0])
        module.optimizer = lambda params, lr: torch.optim.SGD(params, lr=rate, momentum=0.9)
        beside += [GradientHealth(check_every=1)] if watched else []
        torch.manual_seed(0)
        make_trainer(*beside, epochs=6).fit(module, loader())
        weights.append(frozen(module.state_dict()))
        assert not module._forward_pre_hooks and not module.head._forward_hooks and "training_step" not in vars(module)
    assert weights[0] == weights[1]
    assert len(probes) >= 4 or rate > 1e-5
    assert all(probe.before == pytest.approx(probe.full, abs=1e-3) for probe in probes if rate == 1e-5)


class Unusual(Classifier):
    """A complex weight, and an embedding with sparse gradients."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.phase = nn.Parameter(torch.randn(8, dtype=torch.complex64))
            self.table = nn.Embedding(4, 16, sparse=True)

    def hidden(self, x):
        return self.body((x * self.phase).abs()) + self.table((x[:, 0] > 0).long())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_complex_weights_and_sparse_gradients(diagnose):
    assert diagnose(Unusual()) == []


class Detached(Classifier):
    def hidden(self, x):
        return self.body(x).detach()


class WithoutGrad(Classifier):
    @torch.no_grad()
    def hidden(self, x):
        return self.body(x)


@pytest.mark.parametrize("kind", [Detached, WithoutGrad])
@pytest.mark.parametrize("fused", [False, True])
def test_no_gradient(diagnose, kind, fused):
    (verdict,) = diagnose(kind(), *([Fuse(verbose=False)] if fused else []))
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("no_gradient", "body.0", 0)
    assert ("no_grad" in verdict.cause) == (kind is WithoutGrad)


class Late(Classifier):
    """The gradient of a part is left out at first."""

    def __init__(self, first):
        super().__init__()
        self.first, self.seen = first, []
        self.aux = nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        self.seen.append([each.symptom for each in self.health.verdicts])
        is_early = len(self.seen) <= self.first
        with torch.set_grad_enabled(torch.is_grad_enabled() and not (is_early and self.first == 10)):
            hidden = self.body(batch[0])
        loss, aux = F.cross_entropy(self.head(hidden), batch[1]), F.cross_entropy(self.aux(hidden), batch[1])
        if self.first == 20:
            return loss.detach().requires_grad_() if is_early else loss + aux
        return loss if is_early and self.first == 40 else loss + aux


@pytest.mark.parametrize("first", [10, 20, 40])  # under no_grad, no gradient at all, a head that is not used
def test_no_gradient_is_withdrawn_once_one_arrives(make_trainer, first):
    module, health = Late(first), GradientHealth(verbose=False)
    module.health = health
    make_trainer(health, epochs=3, accumulate_grad_batches=1).fit(module, loader())
    assert module.seen[first] == ["no_gradient"] and module.seen[first + 1] == [] and health.verdicts == []


class Rewrapped(Classifier):
    def training_step(self, batch, batch_idx):
        return torch.tensor(super().training_step(batch, batch_idx).item(), requires_grad=True)


class Scored(Classifier):
    def training_step(self, batch, batch_idx):
        guesses = self.head(self.body(batch[0])).argmax(1)
        return F.mse_loss(guesses.float().requires_grad_(), batch[1].float())


class Unrecorded(Classifier):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            loss = super().training_step(batch, batch_idx)
        return loss.requires_grad_()


@pytest.mark.parametrize("kind", [Rewrapped, Scored, Unrecorded])
def test_a_loss_without_a_way_back_to_any_parameter(diagnose, kind):
    (verdict,) = diagnose(kind())
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("no_gradient", None, 0)
    assert "does not depend on any parameter" in verdict.cause and "none of 4 parameters" in verdict.evidence


class OtherOptimized(Classifier):
    """The optimizer holds what the loss does not depend on."""

    def __init__(self, other):
        super().__init__()
        self.other = other
        if other != "no part":
            self.copy = copy.deepcopy(self.head) if other == "copy" else nn.Linear(4, 4)

    def configure_optimizers(self):
        params = copy.deepcopy(self.head).parameters() if self.other == "no part" else self.copy.parameters()
        return torch.optim.SGD(params, lr=0.05)


@pytest.mark.parametrize("other", ["copy", "no part", "unused"])
def test_an_optimizer_of_something_else(diagnose, other):
    (verdict,) = diagnose(OtherOptimized(other))
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("not_optimized", "body.0", 0)
    assert "body.0.weight, body.0.bias, head.weight and 1 more have gradients" in verdict.evidence
    assert ("replaced" if other == "no part" else "no group of any optimizer") in verdict.cause


def test_a_branch_that_is_not_called_is_no_gradient_of_ours(diagnose):
    module = Classifier()
    module.unused = nn.Linear(3, 3)
    assert diagnose(module) == []


def test_not_optimized(diagnose):
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.head.parameters(), lr=0.05)
    (verdict,) = diagnose(module)
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("not_optimized", "body.0", 0)
    module = Classifier()
    module.body.requires_grad_(False)
    module.configure_optimizers = lambda: torch.optim.SGD(module.head.parameters(), lr=0.05)
    assert diagnose(module) == []


class InAList(Classifier):
    def __init__(self, is_optimized=False, is_training=True, holder=list):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = holder([nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)])
        self.is_optimized = is_optimized
        for block in self.blocks:
            block.train(is_training)

    def hidden(self, x):
        x = self.body(x)
        for block in self.blocks:
            x = block(x)
        return x

    def configure_optimizers(self):
        params = [p for block in self.blocks for p in block.parameters()] if self.is_optimized else []
        return torch.optim.SGD([*self.parameters(), *params], lr=0.05)


def test_layers_in_a_list(diagnose):
    for holder in (list, tuple):
        (verdict,) = diagnose(InAList(holder=holder))
        assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("not_optimized", "blocks[0]", 0)
        assert "ModuleList" in verdict.remedy and "blocks[2].weight and 1 more" in verdict.evidence
    # Added by hand; kept away from the checkpoint and the optimizer, as a frozen critic is; found by torch.
    assert diagnose(InAList(is_optimized=True)) == diagnose(InAList(is_training=False)) == []
    assert diagnose(InAList(holder=nn.ModuleList)) == []


class NeverZeroes(Classifier):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradient_not_zeroed(diagnose, accumulated):
    (verdict,) = diagnose(NeverZeroes(), accumulate_grad_batches=accumulated)
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("gradient_not_zeroed", "SGD", 1)


class Manual(Classifier):
    def __init__(self, zero):
        super().__init__()
        self.automatic_optimization, self.zero = False, zero

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        self.zero(optimizer)
        return loss


def zero_by_hand(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad.zero_()


@pytest.mark.parametrize(
    "zero",
    [lambda o: o.zero_grad(), lambda o: o.zero_grad(set_to_none=False), zero_by_hand],
    ids=["none", "zero", "hand"],
)
def test_gradients_that_a_module_clears_itself_are_cleared(diagnose, zero):
    assert diagnose(Manual(zero)) == []


@pytest.mark.parametrize(
    "returned", [lambda loss: loss.expand(3), lambda loss: {"loss": loss.expand(3)}, lambda loss: {}]
)
def test_a_module_that_steps_itself_returns_what_it_likes(diagnose, returned):
    class Returns(Manual):
        def training_step(self, batch, batch_idx):
            return returned(super().training_step(batch, batch_idx).detach())

    assert diagnose(Returns(lambda optimizer: optimizer.zero_grad())) == []


def test_a_module_that_steps_itself_and_clears_nothing(diagnose):
    (verdict,) = diagnose(Manual(lambda optimizer: None))
    assert verdict.symptom == "gradient_not_zeroed"


class Adversaries(pl.LightningModule):
    """The backward pass of each goes through the other, whose gradients are cleared only before its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        second.zero_grad()
        self.manual_backward(self.other(self.one(batch[0][:, :4]).detach()).square().mean())
        second.step()
        first.zero_grad()
        self.manual_backward(-self.other(self.one(batch[0][:, :4])).square().mean().tanh())
        first.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(each.parameters(), lr=0.01) for each in (self.one, self.other)]


def test_two_optimizers_in_turn_are_healthy(diagnose):
    assert diagnose(Adversaries()) == []


def test_nonfinite_in_the_batch(diagnose):
    (verdict,) = diagnose(Classifier(), data=loader(poison=22))
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("nonfinite", None, 5)
    assert verdict.evidence == "infinite or NaN: 8 of 32 numbers of a tensor of shape (4, 8) of the batch"
    assert "batch" in verdict.cause


class Breaks(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, x):
        self.calls += self.training
        return self.how(x) if self.calls > 6 else x


class Root(Classifier):
    """The gradient of a root at 0 is infinite, the root itself is not."""

    def hidden(self, x):
        hidden = self.body(x)
        return (hidden * (hidden > 0)).sqrt() if self.global_step >= 6 else hidden


class LogOfZero(Classifier):
    def training_step(self, batch, batch_idx):
        scores = self.head(self.hidden(batch[0]))
        if self.global_step < 6:
            return F.cross_entropy(scores, batch[1])
        return F.nll_loss(torch.log(F.relu(scores)), batch[1])


def test_nonfinite_in_a_module(diagnose):
    module = Classifier()
    module.body.append(Breaks(lambda x: x / 0.0))
    (verdict,) = diagnose(module)
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("nonfinite", "body.3", 6)


class Raising(Classifier):
    def training_step(self, batch, batch_idx):
        return -super().training_step(batch, batch_idx)


def test_a_loss_that_is_raised(diagnose):
    (verdict,) = diagnose(Raising(), epochs=6, accumulate_grad_batches=1)
    assert verdict.symptom == "loss_does_not_match_output" and "F.cross_entropy times -1" in verdict.cause
    (verdict,) = diagnose(Raising(), epochs=30, accumulate_grad_batches=3)  # a step's loss is that of three batches
    assert "F.cross_entropy times -1" in verdict.cause
    module = Raising()
    module.optimizer = lambda params, lr: torch.optim.SGD(params, lr=lr, maximize=True)
    assert diagnose(module, epochs=6) == []


def test_nonfinite_before_a_module_in_the_loss_or_in_the_gradient(diagnose):
    module = Classifier()
    module.hidden = lambda x: module.body(x) / (0.0 if module.global_step >= 6 else 1.0)
    (verdict,) = diagnose(module)
    assert (verdict.layer, verdict.onset_step) == ("head", 6) and "before this module" in verdict.cause
    (verdict,) = diagnose(LogOfZero())
    assert (verdict.layer, verdict.onset_step) == (None, 6) and "all modules give finite values" in verdict.cause
    (verdict,) = diagnose(Root())
    assert (verdict.layer, verdict.onset_step) == ("body.0", 6) and "a step gave the weights" in verdict.cause


def test_symmetric_init(diagnose):
    module = Classifier()
    module.body[2].p = 0.0
    for param in module.parameters():
        nn.init.constant_(param, 0.1)
    (verdict,) = diagnose(module)
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("symmetric_init", "body.0", 0)
    module = Classifier()
    nn.init.zeros_(module.head.weight)
    assert diagnose(module) == []


class Prompted(Classifier):
    """A parameter of its own, with equal rows that are summed up."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(3, 8))

    def hidden(self, x):
        return self.body(x + self.prompt.sum(0))


def test_equal_rows_of_a_parameter_of_the_module_itself(diagnose):
    (verdict,) = diagnose(Prompted())
    assert (verdict.symptom, verdict.layer) == ("symmetric_init", "prompt")


@pytest.mark.parametrize("beside", [[], [Fuse(verbose=False)]])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_a_weight_decay_that_is_added_to_the_gradient_takes_the_weights_to_0(diagnose, optimizer, beside):
    module = Classifier()
    module.optimizer = lambda params, lr: optimizer(params, lr=3e-3, weight_decay=1.0)
    found = [verdict.cause for verdict in diagnose(module, *beside, epochs=15)]
    assert any("weight decay" in cause for cause in found) == (optimizer is torch.optim.Adam)


def test_wrong_mode(diagnose):
    module = Classifier()
    module.eval()
    (verdict,) = diagnose(module)
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("wrong_mode", "body.2", 0)
    assert verdict.remedy.startswith("self.train() in on_train_start; a model of from_pretrained()")


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_start"])
def test_the_remedy_of_eval_mode_comes_after_the_hook_that_set_it(diagnose, hook):
    module = Classifier()
    setattr(module, hook, lambda *_: module.body.eval())
    (verdict,) = diagnose(module, epochs=2)
    assert verdict.symptom == "wrong_mode" and verdict.onset_step == 0
    assert verdict.remedy.startswith("self.train() in on_train_batch_start; something calls eval()")
    if hook != "on_train_batch_start":
        module.on_train_batch_start = lambda *_: module.train() and None
        assert diagnose(module, epochs=2) == []


def test_a_clip_and_a_weight_decay_that_keep_a_run_from_learning(diagnose):
    module, large = Classifier(), DataLoader(loader().dataset, batch_size=32)
    module.body[2].p = 0.0
    (verdict,) = diagnose(module, data=large, epochs=30, gradient_clip_val=1e-3)
    assert verdict.symptom == "lr_too_low" and "gradients are cut to a norm of 0.001" in verdict.cause
    assert verdict.remedy.startswith("gradient_clip_val=0.03 in the Trainer")
    module = Classifier()
    module.optimizer = lambda params, lr: torch.optim.AdamW(params, lr=3e-3, weight_decay=150)
    (verdict,) = diagnose(module, epochs=6)
    assert verdict.symptom == "lr_too_high" and "weight decay takes away 45% of the weights" in verdict.cause


class Pictures(pl.Callback):
    """Draws something in eval mode after every epoch, and leaves it so."""

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.body.eval()


def test_eval_mode_from_the_second_epoch_on(diagnose):
    module = Classifier()
    module.body.append(nn.BatchNorm1d(16))
    (verdict,) = diagnose(module, Pictures(), epochs=4, accumulate_grad_batches=2)
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("wrong_mode", "body.2", 8)
    assert "body.2 and the batch norm layer body.3" in verdict.evidence and "steps [8, 9, 10]" in verdict.evidence
    assert "on_train_batch_start" in verdict.remedy
    module = Classifier()
    module.on_train_epoch_start = module.train
    assert diagnose(module, Pictures(), epochs=4) == []


def test_layers_that_leave_training_mode_in_every_epoch_are_measured_a_few_times(make_trainer, monkeypatch):
    class Halves(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            self.train(batch_idx < 8)

    measured, original = [], MeasuredSteps.take
    monkeypatch.setattr(MeasuredSteps, "take", lambda self, *args: measured.append(1) or original(self, *args))
    make_trainer(GradientHealth(probe=False), epochs=16, accumulate_grad_batches=1).fit(Halves(), loader())
    assert len(measured) == 8 + 4 * 3 + 1  # the first ones, four times three, and 200


def test_what_the_first_step_shows_is_said_at_once_and_withdrawn_if_later_ones_do_not(make_trainer):
    class FirstInEval(Classifier):
        said = ()

        def training_step(self, batch, batch_idx):
            self.said = (*self.said, [verdict.symptom for verdict in self.trainer.callbacks[0].verdicts])
            self.train(self.global_step > 0)
            return super().training_step(batch, batch_idx)

    module, health = FirstInEval(), GradientHealth(check_every=1, verbose=False)
    make_trainer(health, accumulate_grad_batches=1).fit(module, loader())
    assert module.said[:3] == ([], ["wrong_mode"], []) and health.verdicts == []


@pytest.mark.parametrize(("interval", "length"), [("step", 3), ("epoch", 48)])
def test_schedule_fault(diagnose, interval, length):
    module = Classifier()

    def configure():
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)
        return [optimizer], [{"scheduler": scheduler, "interval": interval}]

    module.configure_optimizers = configure
    (verdict,) = diagnose(module)
    assert (verdict.symptom, verdict.layer) == ("schedule_fault", "CosineAnnealingLR")
    length = {3: 48, 48: 3}[length]
    assert diagnose(module) == []


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda schedulers, o: schedulers.ExponentialLR(o, 0.5),
        lambda schedulers, o: schedulers.StepLR(o, 1, 0.1),
        lambda schedulers, o: schedulers.MultiStepLR(o, [3, 6, 9, 12], 0.1),
    ],
)
def test_a_decay_that_was_meant_by_epochs(diagnose, scheduler):
    module = Classifier()

    def configure(interval):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        made = scheduler(torch.optim.lr_scheduler, optimizer)
        return [optimizer], [{"scheduler": made, "interval": interval}]

    module.configure_optimizers = lambda: configure("step")
    (verdict,) = diagnose(module, epochs=5)
    assert verdict.symptom == "schedule_fault" and verdict.remedy.startswith('{"scheduler": scheduler, "interval": "ep')
    module.configure_optimizers = lambda: configure("epoch")
    assert "schedule_fault" not in [each.symptom for each in diagnose(module, epochs=5)]


@pytest.mark.parametrize("name", ["cosine", "one cycle", "exponential"])
def test_a_schedule_that_ends_low_is_let_be(diagnose, name):
    module = Classifier()

    def configure():
        optimizer, schedulers = torch.optim.SGD(module.parameters(), lr=0.1), torch.optim.lr_scheduler
        made = {
            "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, 80),
            "one cycle": lambda: schedulers.OneCycleLR(optimizer, 0.2, total_steps=80),
            "exponential": lambda: schedulers.ExponentialLR(optimizer, 1e-4 ** (1 / 80)),
        }[name]()
        return [optimizer], [{"scheduler": made, "interval": "step"}]

    module.configure_optimizers = configure
    assert diagnose(module, epochs=5) == []


class Weak(pl.LightningModule):
    """A regression whose inputs explain a twentieth of the targets, or of which so many targets are shuffled."""

    def __init__(self, scale=0.3, shuffled=0, rate=1e-3, columns=1):
        super().__init__()
        self.rate, generator = rate, torch.Generator().manual_seed(2)
        self.x = torch.randn(1800, 10, generator=generator)
        noise = torch.randn(1800, columns, generator=generator)
        self.y = scale * self.x[:, :columns] + noise
        self.y[:shuffled] = self.y[torch.randperm(shuffled, generator=generator)]
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, columns))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.rate)

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x[:1200], self.y[:1200]), batch_size=32)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.x[1200:], self.y[1200:]), batch_size=100)


@pytest.mark.parametrize("scale, columns, shuffled, symptoms", [
    (0.3, 1, 0, []), (0.3, 1, 1800, ["label_shuffle"]), (2.0, 6, 1200, ["label_shuffle"]), (2.0, 6, 0, []),
])  # fmt: skip
def test_labels_are_accused_only_where_those_of_the_validation_tell_that_there_is_something_to_learn(
    make_trainer, scale, columns, shuffled, symptoms
):
    rate = 3e-3 if shuffled else 1e-3
    module, health = Weak(scale, shuffled, rate, columns), GradientHealth(verbose=False)
    make_trainer(health, epochs=6, accumulate_grad_batches=1, limit_val_batches=1.0).fit(module)
    assert [each.symptom for each in health.verdicts] == symptoms
    assert "validation_step" not in vars(module)
    if symptoms:
        constant = float(module.y[1200:].var(0).mean())
        assert f"{constant:.4g}" in health.verdicts[0].evidence


@pytest.mark.parametrize("fused", [False, True])
def test_lost_updates(diagnose, fused):
    module = Classifier()
    module.optimizer = lambda params, lr: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0)
    (verdict,) = diagnose(module, *([Fuse(verbose=False)] if fused else []), precision="bf16-true")
    assert verdict.symptom == "lost_updates"
    if fused:
        cured = Classifier()
        cured.optimizer = module.optimizer
        for rounding in ("kahan", "stochastic"):
            assert diagnose(cured, Fuse(rounding=rounding, verbose=False), precision="bf16-true") == []


@pytest.mark.parametrize("fused", [False, True])
def test_average_not_ready(diagnose, fused):
    module = Classifier()
    module.optimizer = AdamW if fused else torch.optim.AdamW
    (verdict,) = diagnose(module, WeightAveraging(EMA(0.999)))
    assert verdict.symptom == "average_not_ready" and "EMA(decay=0.8" in verdict.remedy
    assert diagnose(module, WeightAveraging(EMA(0.8))) == []


class TwoSoftmaxes(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.hidden(batch[0])).softmax(1), batch[1])


def test_loss_does_not_match_output(diagnose):
    (verdict,) = diagnose(TwoSoftmaxes())
    assert verdict.symptom == "loss_does_not_match_output" and "softmax" in verdict.remedy


def test_probes_leave_schedulers_alone_and_can_be_left_out(make_trainer, monkeypatch):
    class StepsIt(Classifier):
        def training_step(self, batch, batch_idx):
            self.lr_schedulers().step()
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-6)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            return [optimizer], [{"scheduler": scheduler, "interval": "epoch", "frequency": 1000}]

    probes, original = [], Probe.measure
    monkeypatch.setattr(Probe, "measure", lambda self, *args: probes.append(original(self, *args)) or probes[-1])
    left_out_later = GradientHealth(verbose=False)
    left_out_later.probe = False
    for health in (GradientHealth(verbose=False), GradientHealth(verbose=False, probe=False), left_out_later):
        module, probe = StepsIt(), health.probe
        trainer = make_trainer(health, epochs=3, accumulate_grad_batches=1)
        trainer.fit(module, loader())
        assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 48
        assert bool(probes) == probe
        probes.clear()


@pytest.mark.parametrize(
    ("made", "drawn"),
    [
        (lambda: torch.Generator().manual_seed(3), lambda own: float(torch.rand((), generator=own))),
        (lambda: np.random.default_rng(3), lambda own: own.random()),
        (lambda: np.random.RandomState(3), lambda own: own.rand()),
        (lambda: random.Random(3), lambda own: own.random()),
    ],
    ids=["torch", "numpy", "numpy, old", "random"],
)
def test_probes_draw_nothing_from_a_generator_of_the_module(make_trainer, monkeypatch, frozen, made, drawn):
    class Noisy(Classifier):
        optimizer = staticmethod(lambda params, lr: torch.optim.SGD(params, lr=1e-6))

        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0] + drawn(self.body.own), batch[1]), batch_idx)

    weights, probes, original = [], [], Probe.measure
    monkeypatch.setattr(Probe, "measure", lambda self, *args: probes.append(original(self, *args)) or probes[-1])
    for callbacks in ([], [GradientHealth(verbose=False)]):
        torch.manual_seed(0)
        module = Noisy()
        module.body.own = made()
        make_trainer(*callbacks, epochs=3, accumulate_grad_batches=1).fit(module, loader())
        weights.append(frozen(module.state_dict()))
    assert weights[0] == weights[1] and probes


@pytest.mark.parametrize(("rate", "symptom"), [(1e-6, "lr_too_low"), (300.0, "lr_too_high")])
@pytest.mark.parametrize("fused", [False, True])
def test_learning_rates(diagnose, rate, symptom, fused):
    module = Classifier()
    module.optimizer = lambda params, lr: torch.optim.SGD(params, lr=rate)
    data = DataLoader(loader().dataset, batch_size=16)
    verdicts = diagnose(module, *([Fuse(verbose=False)] if fused else []), data=data, epochs=24)
    assert verdicts[0].symptom == symptom


def test_batches_of_one_sample_are_healthy(diagnose):
    data = DataLoader(loader().dataset, batch_size=1, shuffle=True)
    assert diagnose(Classifier(), data=data) == []


def test_data_and_initial_weights(diagnose):
    module, rows = Classifier(), loader().dataset.tensors
    wide = (rows[0] * torch.tensor([1.0] * 7 + [1e4]), rows[1])
    module.optimizer = lambda params, lr: torch.optim.SGD(params, lr=1e-4)
    data = DataLoader(TensorDataset(*wide), batch_size=16)
    assert diagnose(module, data=data, epochs=15)[0].symptom == "unnormalized_input"
    module = Classifier()
    nn.init.constant_(module.body[0].bias, -30.0)
    assert diagnose(module, data=DataLoader(TensorDataset(*rows), batch_size=32), epochs=25)[0].symptom == "dead_units"
    module = Classifier()
    same = DataLoader(TensorDataset(rows[0][:1].expand_as(rows[0]), rows[1]), batch_size=4)
    assert diagnose(module, data=same)[0].symptom == "input_ignored"


# --- what is told, kept and refused ---


@pytest.mark.parametrize("symptom", ["wrong_mode", "lr_too_high"])
def test_a_new_primary_verdict_is_a_warning_once(make_trainer, symptom):
    """Also if its numbers change from check to check."""
    for verbose in (True, False):
        module = Classifier()
        if symptom == "wrong_mode":
            module.eval()
        else:
            module.optimizer = lambda params, lr: torch.optim.AdamW(params, lr=3.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            health = GradientHealth(check_every=1, verbose=verbose)
            make_trainer(health, epochs=8, accumulate_grad_batches=1).fit(module, loader())
        assert [verdict.symptom for verdict in health.verdicts] == [symptom]
        told = [str(each.message) for each in caught if f"GradientHealth: {symptom}" in str(each.message)]
        assert len(told) == verbose


def test_verdicts_are_there_during_the_fit_in_json_and_in_checkpoints(make_trainer, tmp_path):
    class Asks(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append([verdict.symptom for verdict in health.verdicts])

    seen, health, module = [], GradientHealth(verbose=False), Classifier()
    module.eval()
    trainer = make_trainer(health, Asks(), epochs=2)
    trainer.fit(module, loader())
    assert seen == [["wrong_mode"]] * 2
    assert [each["symptom"] for each in json.loads(health.to_json())] == ["wrong_mode"]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = GradientHealth(verbose=False)
    make_trainer(resumed, epochs=3).fit(Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert resumed.verdicts == health.verdicts  # of the run, not of the process
    make_trainer(resumed, epochs=1).fit(Classifier(), loader())
    assert resumed.verdicts == []


def test_what_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"^GradientHealth\(check_every=0\)"):
        GradientHealth(check_every=0)
    with pytest.raises(ValueError, match=r"^GradientHealth\(verbose=None\)"):
        GradientHealth(verbose=None)
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `GradientHealth`"):
        make_trainer(GradientHealth(), GradientHealth())  # Lightning's own words
    with pytest.raises(ValueError, match="verdicts"):
        GradientHealth().load_state_dict({})


def test_an_exception_leaves_nothing_behind(make_trainer):
    module = Classifier()
    module.optimizer = AdamW

    def fails(x):
        raise RuntimeError("out of luck")

    module.hidden = fails
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer(GradientHealth(check_every=1)).fit(module, loader())
    assert not module.head._forward_pre_hooks and not module.trainer.optimizers[0].record_statistics


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("healthy", []),
        ("diverges", ["ranks_diverge"]),
        ("duplicates", ["duplicate_data"]),
        ("bypassed", ["ranks_diverge"]),
        ("dominated", []),
    ],
)
def test_on_two_processes(tmp_path, case, expected):
    launch(Path(__file__).parent / "gradient_health_worker.py", tmp_path, case, processes=2, timeout=120)
    for rank in range(2):
        verdicts = json.loads((tmp_path / f"{case}.{rank}.json").read_text())
        assert [verdict["symptom"] for verdict in verdicts] == expected
        if case == "diverges":
            assert (verdicts[0]["layer"], verdicts[0]["onset_step"]) == ("net.2.weight", 4)
