# SPDX-License-Identifier: Apache-2.0
"""Real runs, broken one by one: numbers that are not finite, equal or decayed weights, and layers in the wrong mode."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from gradient_health_cases import Classifier, loader
from torch import nn

from lightning_optkit.callbacks import Fuse, GradientHealth
from lightning_optkit.callbacks.seams.measured_steps import MeasuredSteps

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GradientHealth.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


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
